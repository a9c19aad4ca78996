"""The groups that a server takes for the key exchange: elliptic curves, and no others.

Without a list OpenSSL also takes ffdhe2048 to ffdhe8192 of RFC 7919 from whoever asks for them:
170 ms for the longest, before anything is known of a client. A curve costs 0.1 to 2 ms.

Python can name a list from 3.15 on, and one curve before; so OpenSSL is asked itself, by
SSL_CTX_set1_groups_list(3).
"""

import _ssl
import ctypes
import ssl

_GROUPS = "X25519:P-256:X448:P-521:P-384"
"""By preference."""
_HYBRID = "X25519MLKEM768:"
"""Before them where OpenSSL knows it, from 3.5 on: secret also from who records for later."""
_SET_GROUPS_LIST = 92
"""SSL_CTRL_SET_GROUPS_LIST of openssl/ssl.h."""


def set_groups(context: ssl.SSLContext) -> None:
    """Take no other groups. Only P-256 where this Python's OpenSSL cannot be reached."""
    try:
        control = ctypes.CDLL(getattr(_ssl, "__file__", None)).SSL_CTX_ctrl
    except (OSError, AttributeError):
        context.set_ecdh_curve("prime256v1")
        return
    control.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_char_p)
    control.restype = ctypes.c_long
    # The first member of CPython's PySSLContext, behind what every object begins with.
    inner = ctypes.c_void_p.from_address(id(context) + object.__basicsize__)
    if not any(
        control(inner, _SET_GROUPS_LIST, 0, groups.encode())
        for groups in (_HYBRID + _GROUPS, _GROUPS)
    ):
        context.set_ecdh_curve("prime256v1")
