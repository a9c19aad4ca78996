"""Mutual TLS: the contexts of both ends.

Three rules carry the access control (RFC 8446, RFC 5280). Both ends trust the CAs of the one file
that they are given and nothing of the system's: each of these CAs by itself, whether it is a root
or was issued by one that is not in the file. Both ends demand a certificate. Nothing is resumed:
a resumed session skips the peer's certificate, and with it a revocation that came in between,
so no tickets are sent. (TLS 1.2, where it is allowed, still resumes by session id inside one
context.) New revocations mean a new context: OpenSSL would keep the old list beside the new one.

A server's own files are checked before it listens, by the rules that its clients will apply; a
client leaves that to the server's answer, because OpenSSL's bindings would double its start.
So this module reaches only the standard library and attrs until a server asks for more.
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
    from jobworker.pki.material import ServerFiles

_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"
"""Those of TLS 1.2; of 1.3 all are good. Level 2 of SSL_CTX_set_security_level(3), for both: no
chain with an RSA key below 2,048 bits or a curve below 224, and none that is signed by SHA-1."""

_CLIENT_REMEDY = (
    "copy ca-cert.pem and a client's two files from the directory of 'worker certs init', "
    "or name others (for worker-cli: with --ca, --cert and --key)"
)


def server_context(
    files: "ServerFiles", *, min_version: Literal["1.2", "1.3"] = "1.3"
) -> ssl.SSLContext:
    """Make the context of a server that takes only clients of its CA; check its own files too.

    The certificate's file may hold intermediate certificates after the server's own. Clients that
    the revocation list names are refused, and all of them once it has expired. Raises
    `CredentialsUnusable`, naming the file and the reason.
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
    """Make the context of a client that takes only servers of `ca`, under the name it dialled.

    Raises `CredentialsUnusable`, naming the file and the reason.
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
    """Say that others than its owner can reach a key file, as ssh does; None if all is well."""
    try:
        mode = stat.S_IMODE(key.stat().st_mode)
    except OSError:
        return None  # making the context names this fault
    if os.name != "posix" or not mode & 0o077:
        return None
    return f"the key {key} is open to others than its owner (mode {mode:04o}); chmod 600 {key}"
