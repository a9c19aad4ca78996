"""A list that does not cover all certificates of its CA is refused by name before its use."""

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import extensions as e

from jobworker import errors
from jobworker.pki.credentials import PemFile
from jobworker.pki.revocation import Verifier, list_warnings, read_lists
from jobworker.pki.server_files import ServerFiles
from jobworker.pki.tls import server_context

from .handshakes import NOW, Site

URI = x509.UniformResourceIdentifier("http://crl.example.org/1.crl")
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0")


def point(**limits: object) -> x509.IssuingDistributionPoint:
    """An extension with these limits and no other."""
    fields = dict.fromkeys(("full_name", "relative_name", "only_some_reasons"))
    flags = dict.fromkeys(
        (
            "only_contains_user_certs",
            "only_contains_ca_certs",
            "indirect_crl",
            "only_contains_attribute_certs",
        ),
        False,
    )
    return x509.IssuingDistributionPoint(**{**fields, **flags, **limits})  # type: ignore[arg-type]


def with_list(
    site: Site, *extensions: tuple[x509.ExtensionType, bool], entry: bool | None = None
) -> ServerFiles:
    """The site's files with a list of these extensions (critical or not) in place of its own.

    `entry`: whether the list has an entry, and whether the entry's extension is critical.
    """
    root = site.authority.root
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(root.certificate.subject)
        .last_update(NOW - timedelta(hours=1))
        .next_update(NOW + timedelta(days=1))
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    if entry is not None:
        revoked = x509.RevokedCertificateBuilder().serial_number(1).revocation_date(NOW)
        builder = builder.add_revoked_certificate(revoked.add_extension(UNKNOWN, entry).build())
    made = builder.sign(root.key, hashes.SHA256()).public_bytes(Encoding.PEM)
    files = site.files()
    lists = PemFile(Path("lists.pem"), made)
    return ServerFiles(ca=files.ca, certificate=files.certificate, key=files.key, crl=lists)


INCOMPLETE = {
    "delta list": (x509.DeltaCRLIndicator(1), True),
    "delta list,": (x509.DeltaCRLIndicator(1), False),
    "onlyContainsUserCerts": (point(only_contains_user_certs=True), True),
    "onlyContainsCACerts": (point(only_contains_ca_certs=True), True),
    "onlyContainsAttributeCerts": (point(only_contains_attribute_certs=True), True),
    "indirectCRL": (point(indirect_crl=True), True),
    "onlySomeReasons": (
        point(only_some_reasons=frozenset({e.ReasonFlags.key_compromise}), full_name=[URI]),
        True,
    ),
    "1.2.3.4": (UNKNOWN, True),
    "2.5.29.20": (x509.CRLNumber(1), True),
    "is only for a distribution point": (point(full_name=[URI]), True),
}


@pytest.mark.parametrize(("named", "extension"), INCOMPLETE.items(), ids=INCOMPLETE)
def test_incomplete_list_is_refused_by_name(
    site: Site, named: str, extension: tuple[x509.ExtensionType, bool]
) -> None:
    files = with_list(site, extension)
    for use in (server_context, lambda files: Verifier.of(files, NOW)):
        with pytest.raises(errors.CredentialsUnusable) as caught:
            use(files)
        assert "cannot use the revocation list lists.pem: " in caught.value.message
        assert named in caught.value.message
        assert caught.value.remedy


def test_critical_extension_of_an_entry_is_refused_by_name(site: Site) -> None:
    with pytest.raises(errors.CredentialsUnusable, match=r"extension 1\.2\.3\.4 of an entry"):
        read_lists(with_list(site, entry=True), NOW)


def test_complete_list_is_accepted_with_extensions_that_openssl_may_pass_over(site: Site) -> None:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(
        site.authority.root.key.public_key()
    )
    files = with_list(site, (identifier, True), (x509.CRLNumber(1), False), entry=False)
    assert len(read_lists(files, NOW).all) == 1
    assert list_warnings(files, NOW) == ()
