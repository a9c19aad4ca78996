"""Mutual TLS: the contexts of both ends.

Three rules carry the access control (RFC 8446, RFC 5280). Both ends trust the one CA file that
they are given and nothing of the system's. Both ends demand a certificate. Nothing is resumed:
a resumed session skips the peer's certificate, and with it a revocation that came in between,
so no tickets are sent. (TLS 1.2, where it is allowed, still resumes by session id inside one
context: whoever loads new revocations makes a new context.)

A server's own files are checked before it listens, by the rules that its clients will apply; a
client leaves that to the server's answer, because OpenSSL's bindings would double its start.
So this module reaches only the standard library and attrs until a server asks for more.
"""

import os
import ssl
import stat
from pathlib import Path
from typing import Literal

from jobworker.pki.credentials import SERVER_REMEDY, check_server_certificate, load

_CLIENT_REMEDY = (
    "copy ca-cert.pem and a client's two files from the directory of 'worker certs init', "
    "or name others with --ca, --cert and --key"
)


def server_context(
    *, ca: Path, certificate: Path, key: Path, min_version: Literal["1.2", "1.3"] = "1.3"
) -> ssl.SSLContext:
    """Make the context of a server that takes only clients of `ca`; check its own files too.

    `certificate` may hold intermediate certificates after the server's own. Raises
    `CredentialsUnusable`, naming the file and the reason.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = (
        ssl.TLSVersion.TLSv1_3 if min_version == "1.3" else ssl.TLSVersion.TLSv1_2
    )
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # 1.2 only; those of 1.3 are all good
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    load(context, "server", SERVER_REMEDY, ca=ca, certificate=certificate, key=key)
    check_server_certificate(ca, certificate)
    return context


def client_context(*, ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """Make the context of a client that takes only servers of `ca`, under the name it dialled.

    Raises `CredentialsUnusable`, naming the file and the reason.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # CERT_REQUIRED and check_hostname are on
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.hostname_checks_common_name = False
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    load(context, "client", _CLIENT_REMEDY, ca=ca, certificate=certificate, key=key)
    return context


def key_mode_warning(key: Path) -> str | None:
    """Say that others than its owner can reach a key file, as ssh does; None if all is well."""
    try:
        mode = stat.S_IMODE(key.stat().st_mode)
    except OSError:
        return None  # making the context names this fault
    if os.name != "posix" or not mode & 0o077:
        return None
    return f"the key {key} is open to others than its owner (mode {mode:04o}); chmod 600 {key}"
