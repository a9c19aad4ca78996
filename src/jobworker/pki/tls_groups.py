"""Restrict the groups of a server's key exchange to elliptic curves.

Without a list, OpenSSL also accepts ffdhe2048 to ffdhe8192 of RFC 7919 from every client. The
longest costs the server 170 ms before it knows anything about the client; a curve costs 0.1 to
2 ms.

Python can set a list of groups from 3.15 on, and before that only one curve. So this module calls
OpenSSL itself: SSL_CTX_set1_groups_list(3).
"""

import _ssl
import ctypes
import ssl

_GROUPS = "X25519:P-256:X448:P-521:P-384"
"""In the order of preference."""
_HYBRID = "X25519MLKEM768:"
"""Preferred to these where OpenSSL has it, from 3.5 on. It also protects recorded traffic against
a later quantum computer."""
_SET_GROUPS_LIST = 92
"""SSL_CTRL_SET_GROUPS_LIST of openssl/ssl.h."""


def set_groups(context: ssl.SSLContext) -> None:
    """Allow these groups only; only P-256 if this Python's OpenSSL cannot be called by ctypes."""
    try:
        control = ctypes.CDLL(getattr(_ssl, "__file__", None)).SSL_CTX_ctrl
    except (OSError, AttributeError):
        context.set_ecdh_curve("prime256v1")
        return
    control.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_char_p)
    control.restype = ctypes.c_long
    # The SSL_CTX pointer: the first member of CPython's PySSLContext after the object header.
    inner = ctypes.c_void_p.from_address(id(context) + object.__basicsize__)
    if not any(
        control(inner, _SET_GROUPS_LIST, 0, groups.encode())
        for groups in (_HYBRID + _GROUPS, _GROUPS)
    ):
        context.set_ecdh_curve("prime256v1")
