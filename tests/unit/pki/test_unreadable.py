"""Certificates that OpenSSL accepts and `cryptography` does not are refused by name."""

import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID

from jobworker import errors
from jobworker.pki.authority import Authority
from jobworker.pki.certificate_files import read_certificate
from jobworker.pki.credentials import PemFile, check_authorities, check_server_certificate
from jobworker.pki.expiry import expiry_warnings
from jobworker.pki.own_certificate import with_cause
from jobworker.pki.refusals import AMBIGUOUS
from jobworker.pki.revocation import read_lists
from jobworker.pki.server_files import ServerFiles

from .handshakes import Site

VERSION, EC_KEY = bytes.fromhex("a003020102"), bytes.fromhex("2a8648ce3d0201")
X400_ADDRESS = bytes.fromhex("3002a300")
"""A subject alternative name with the general name [3] of RFC 5280."""


def pem_of(der: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(der).encode()


def spoilt(site: Site, *extra: tuple[x509.ObjectIdentifier, bytes]) -> bytes:
    """The authority's own certificate with more extensions, in DER."""
    root = site.authority.root
    made = root.certificate
    builder = x509.CertificateBuilder(
        made.issuer,
        made.subject,
        made.public_key(),
        x509.random_serial_number(),
        made.not_valid_before_utc,
        made.not_valid_after_utc,
    )
    for each in made.extensions:
        builder = builder.add_extension(each.value, each.critical)
    for oid, value in extra:
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
    return builder.sign(root.key, hashes.SHA256()).public_bytes(Encoding.DER)


def version_2(site: Site) -> bytes:
    return spoilt(site).replace(VERSION, VERSION[:-1] + b"\1", 1)


def extension_twice(site: Site) -> bytes:
    oids = [x509.ObjectIdentifier(f"1.2.3.{last}") for last in (4, 5)]
    der = spoilt(site, *((oid, b"\5\0") for oid in oids))
    return der.replace(bytes.fromhex("06032a0305"), bytes.fromhex("06032a0304"), 1)


def general_name_unknown(site: Site) -> bytes:
    return spoilt(site, (ExtensionOID.SUBJECT_ALTERNATIVE_NAME, X400_ADDRESS))


def key_unknown(site: Site) -> bytes:
    return spoilt(site).replace(EC_KEY, EC_KEY[:-1] + b"\x09", 1)


def as_authority(site: Site, directory: Path, bad: bytes) -> None:
    check_authorities(PemFile(directory, site.path("ca-cert").read_bytes() + bad))


def as_server(site: Site, directory: Path, bad: bytes) -> None:
    check_server_certificate(site.files().ca, PemFile(directory, bad))


def behind_the_server(site: Site, directory: Path, bad: bytes) -> None:
    own = PemFile(directory, site.path("server-cert").read_bytes() + bad)
    check_server_certificate(site.files().ca, own)


def to_be_shown(site: Site, directory: Path, bad: bytes) -> None:
    del site
    path = directory / "x-cert.pem"
    path.write_bytes(bad)
    read_certificate(path)


def as_issuer(site: Site, directory: Path, bad: bytes) -> None:
    (directory / "ca-cert.pem").write_bytes(bad)
    (directory / "ca-key.pem").write_bytes(site.path("ca-key").read_bytes())
    Authority.load(directory)


def a_day_later(site: Site, directory: Path, bad: bytes) -> None:
    made = site.files()
    ca = PemFile(directory, bad)
    files = ServerFiles(ca=ca, certificate=made.certificate, key=made.key)
    expiry_warnings(files, datetime.now(UTC))


def issuer_of_a_list(site: Site, directory: Path, bad: bytes) -> None:
    made = site.files()
    behind = PemFile(directory, made.certificate.content + bad)
    check_server_certificate(made.ca, behind)
    files = ServerFiles(ca=made.ca, certificate=behind, key=made.key, crl=made.crl)
    read_lists(files, datetime.now(UTC))


def own_of_a_client(site: Site, directory: Path, bad: bytes) -> None:
    del site
    path = directory / "own-cert.pem"
    path.write_bytes(bad)
    refused = errors.CertificateRefused("refused", data={"alert": AMBIGUOUS})
    assert isinstance(with_cause(refused, path), errors.CertificateRefused)


READERS = [
    as_authority,
    as_server,
    behind_the_server,
    to_be_shown,
    as_issuer,
    a_day_later,
    issuer_of_a_list,
    own_of_a_client,
]
Maker = Callable[[Site], bytes]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "make", [version_2, extension_twice, general_name_unknown, key_unknown, spoilt]
)
def test_unreadable_certificate_is_refused_by_name_or_does_not_matter(
    site: Site, tmp_path: Path, make: Maker, read: Callable[[Site, Path, bytes], None]
) -> None:
    refused: errors.JobworkerError | None = None
    try:
        read(site, tmp_path, pem_of(make(site)))
    except errors.CredentialsUnusable as error:  # any other exception fails the test
        refused = error
    if refused is None:
        assert make is not version_2 or read is own_of_a_client
    else:
        assert str(tmp_path) in refused.message
        assert refused.remedy
        assert make is not spoilt or read is as_server


def test_unreadable_list_is_refused_by_name(site: Site, tmp_path: Path) -> None:
    """Of version 3, which there is not, and with an extension twice."""
    root = site.authority.root
    now = datetime.now(UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(root.certificate.subject)
        .last_update(now - timedelta(hours=1))
        .next_update(now + timedelta(days=1))
    )
    for last in (4, 5):
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.2.3.{last}"), b"\5\0")
        builder = builder.add_extension(unknown, critical=False)
    der = builder.sign(root.key, hashes.SHA256()).public_bytes(Encoding.DER)
    twice = der.replace(bytes.fromhex("06032a0305"), bytes.fromhex("06032a0304"), 1)
    version_3 = der.replace(b"\2\1\1", b"\2\1\2", 1)
    made = site.files()
    for bad in (twice, version_3):
        pem = pem_of(bad).replace(b"CERTIFICATE", b"X509 CRL")
        lists = PemFile(tmp_path / "crl.pem", pem)
        files = ServerFiles(ca=made.ca, certificate=made.certificate, key=made.key, crl=lists)
        with pytest.raises(errors.CredentialsUnusable, match=r"crl\.pem: it"):
            read_lists(files, now)
