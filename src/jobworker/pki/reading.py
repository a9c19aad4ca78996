"""A certificate from a PEM file, as the index would have it."""

from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from jobworker import errors
from jobworker.pki.credentials import read_pem
from jobworker.pki.registry import Entry, entry_of


def read_certificate(path: Path) -> Entry:
    """The first certificate of a PEM file. Raises `CredentialsUnusable`."""
    remedy = "name the PEM file of a certificate"
    file = read_pem(path, "certificate", "CERTIFICATE", remedy)
    try:
        certificate = x509.load_pem_x509_certificate(file.content)
        usage = [
            each.value
            for each in certificate.extensions
            if isinstance(each.value, x509.ExtendedKeyUsage)
        ]
    except ValueError as error:
        raise errors.CredentialsUnusable(
            f"cannot use the certificate {path}: it is damaged ({error})", remedy=remedy
        ) from None
    server = any(ExtendedKeyUsageOID.SERVER_AUTH in each for each in usage)
    stem = path.name.removesuffix(".pem").removesuffix("-cert")
    return entry_of(certificate, "server" if server else "client", stem)
