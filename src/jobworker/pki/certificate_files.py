"""Read a certificate from a PEM file, together with the entry that the index would have of it."""

from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from jobworker import errors
from jobworker.pki.credentials import read_pem
from jobworker.pki.registry import CertificateEntry, Kind, entry_of
from jobworker.pki.unreadable import UNREADABLE


def read_certificate(path: Path) -> tuple[x509.Certificate, CertificateEntry]:
    """Return the first certificate of a PEM file and its entry. Raises `CredentialsUnusable`."""
    remedy = "name the PEM file of a certificate"
    file = read_pem(path, "certificate", "CERTIFICATE", remedy)
    try:
        certificate = x509.load_pem_x509_certificate(file.content)
        stem = path.name.removesuffix(".pem").removesuffix("-cert")
        return certificate, entry_of(certificate, _kind_of(certificate), stem)
    except UNREADABLE as error:
        raise errors.CredentialsUnusable(
            f"cannot use the certificate {path}: it is damaged ({error})", remedy=remedy
        ) from None


def _kind_of(certificate: x509.Certificate) -> Kind:
    values = [each.value for each in certificate.extensions]
    if any(isinstance(each, x509.BasicConstraints) and each.ca for each in values):
        return "CA"
    for each in values:
        if isinstance(each, x509.ExtendedKeyUsage) and ExtendedKeyUsageOID.SERVER_AUTH in each:
            return "server"
    return "client"
