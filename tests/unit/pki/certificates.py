"""What the tests look for in certificates: the full set, and OpenSSL's strict judgement."""

from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from OpenSSL import crypto

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


CERTIFICATES = ["ca", "server", "admin-client", "viewer-client"]


FILES = sorted(
    [f"{stem}-{what}.pem" for stem in CERTIFICATES for what in ("cert", "key")]
    + ["ca-crl.pem", "issued.json"]
)


def read(directory: Path, stem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / f"{stem}-cert.pem").read_bytes())


def verify_strictly(certificate: x509.Certificate, ca: x509.Certificate, now: datetime) -> None:
    store = crypto.X509Store()
    store.set_flags(crypto.X509StoreFlags.X509_STRICT)
    store.set_time(now)
    store.add_cert(crypto.X509.from_cryptography(ca))
    crypto.X509StoreContext(store, crypto.X509.from_cryptography(certificate)).verify_certificate()
