"""What comes to its end is told in time, by name, with a remedy that its holder can use."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from jobworker.pki.credentials import PemFile
from jobworker.pki.expiry import expiry_warnings
from jobworker.pki.server_files import ServerFiles

from .handshakes import NOW, Site

PEM = serialization.Encoding.PEM


def company(names: tuple[str, ...], list_days: int) -> ServerFiles:
    """CAs of a company's own, and their lists; the first one's certificate is the server's too."""
    certificates, lists = b"", b""
    for text in names:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(NOW)
            .not_valid_after(NOW + timedelta(days=900))
            .sign(key, hashes.SHA256())
        )
        made = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(name)
            .last_update(NOW)
            .next_update(NOW + timedelta(days=list_days))
            .sign(key, hashes.SHA256())
        )
        certificates += certificate.public_bytes(PEM)
        lists += made.public_bytes(PEM)
    path = Path("all.pem")
    both = PemFile(path, certificates)
    return ServerFiles(ca=both, certificate=both, key=both, crl=PemFile(path, lists))


def after(days: float) -> datetime:
    return NOW + timedelta(days=days)


@pytest.mark.parametrize(("list_days", "silent", "told"), [(30, 19, 21), (300, 269, 271)])
def test_list_is_told_of_in_its_last_third_and_not_before_the_last_month(
    list_days: int, silent: float, told: float
) -> None:
    files = company(("Root", "Issuing CA"), list_days)
    assert expiry_warnings(files, after(0.1)) == ()
    assert expiry_warnings(files, after(silent)) == ()
    warnings = expiry_warnings(files, after(told))
    assert [warning.partition(" in ")[0] for warning in warnings] == [
        "the revocation list of CN=Root",
        "the revocation list of CN=Issuing CA",
    ]
    assert all("get that CA's next one" in warning for warning in warnings)
    assert not any("worker certs" in warning for warning in warnings)


def test_own_authority_s_files_come_with_the_command_that_makes_new_ones(site: Site) -> None:
    end = x509.load_pem_x509_crl(site.files().crl.content).next_update_utc  # type: ignore[union-attr]
    assert end is not None
    warnings = expiry_warnings(site.files(), end - timedelta(days=29))
    assert "'worker certs crl'" in warnings[-1]
    assert "'worker certs renew server'" in warnings[0]
    assert end.tzinfo is UTC
