"""Mutual TLS: the contexts of server and client.

Three rules carry the access control (RFC 8446, RFC 5280):

- Both ends trust the CAs in one given file and none of the system's. Each of these CAs is a trust
  anchor, whether it is a root or was issued by a CA outside of the file.
- Both ends require a certificate.
- No session is resumed. A resumed session would skip the check of the peer's certificate, and with
  it a later revocation, so the server sends no tickets. (TLS 1.2, where it is allowed, still
  resumes by session id inside one context.)

A new revocation list needs a new context: OpenSSL would keep the old list beside the new one.

A server checks its own files before it listens, by the rules that its clients will apply. A client
does not check its own and relies on the server's answer, because pyOpenSSL would double its start
time. So this module imports only the standard library and attrs until a server needs more.
"""

import os
import ssl
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobworker.pki.credentials import (
    RENEWAL,
    SERVER_REMEDY,
    check_authorities,
    check_server_certificate,
    load,
    read_pem,
)

if TYPE_CHECKING:
    from jobworker.pki.server_files import ServerFiles

_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"
"""The ciphers for TLS 1.2; those of 1.3 are all strong. For both versions, security level 2 of
SSL_CTX_set_security_level(3): no chain with an RSA key below 2,048 bits, a curve below 224 bits, or
a signature with SHA-1."""

_CLIENT_REMEDY = (
    "copy ca-cert.pem and a client's two files from the directory of 'worker certs init', "
    "or name other files (for worker-cli: with --ca, --cert and --key)"
)


def server_context(
    files: "ServerFiles", *, min_version: Literal["1.2", "1.3"] = "1.3"
) -> ssl.SSLContext:
    """Make the context of a server that accepts only clients of its CA; check its own files too.

    The certificate's file may contain intermediate certificates after the server's own. The context
    refuses clients in the revocation list, and every client once the list has expired. Raises
    `CredentialsUnusable`, which names the file and the reason.
    """
    from jobworker.pki.revocation import read_lists
    from jobworker.pki.tls_groups import set_groups

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = (
        ssl.TLSVersion.TLSv1_3 if min_version == "1.3" else ssl.TLSVersion.TLSv1_2
    )
    context.set_ciphers(_CIPHERS)
    set_groups(context)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    with files.placed() as at:
        load(
            *(context, "server", SERVER_REMEDY),
            ca=at.ca,
            certificate=at.certificate,
            key=at.key,
            pair_remedy=RENEWAL,
        )
        check_authorities(files.ca)
        check_server_certificate(files.ca, files.certificate)
        if at.crl is not None:
            lists = read_lists(files, datetime.now(UTC))
            context.load_verify_locations(cafile=at.crl.at)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
            if lists.reaches_up:
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
                context.verify_flags &= ~ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def client_context(*, ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """Make the context of a client that accepts only a server of `ca` with the name it dialled.

    Raises `CredentialsUnusable`, which names the file and the reason.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # CERT_REQUIRED and check_hostname are on
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_ciphers(_CIPHERS)
    context.hostname_checks_common_name = False
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    load(
        context,
        "client",
        _CLIENT_REMEDY,
        ca=read_pem(ca, "CA certificate", "CERTIFICATE", _CLIENT_REMEDY),
        certificate=read_pem(certificate, "client certificate", "CERTIFICATE", _CLIENT_REMEDY),
        key=read_pem(key, "client key", "PRIVATE KEY", _CLIENT_REMEDY),
    )
    return context


def key_mode_warning(key: Path) -> str | None:
    """Return a warning if other users than its owner can open a key file, as ssh does, or None."""
    try:
        mode = stat.S_IMODE(key.stat().st_mode)
    except OSError:
        return None  # the code that makes the context reports this error
    if os.name != "posix" or not mode & 0o077:
        return None
    return f"the key {key} is open to other users than its owner (mode {mode:04o}); chmod 600 {key}"
