"""Unusable certificate files: each fault names the file and its reason."""

import os
import shutil
import ssl
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from attrs import define, evolve
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobworker import errors
from jobworker.pki import tls
from jobworker.pki.administration import init_authority
from jobworker.pki.authority import Authority
from jobworker.pki.server_files import ServerFiles

from .handshakes import (
    LONG_AGO,
    NOW,
    Site,
    issue,
    type_cn,
)

MAKERS: dict[str, Callable[..., ssl.SSLContext]] = {
    "server": lambda **paths: tls.server_context(ServerFiles.read(**paths)),
    "client": tls.client_context,
}


@define(eq=False)
class Files:
    """Paths of a context's three files, each a copy that a test may spoil."""

    ca: Path
    certificate: Path
    key: Path

    def make(self, side: str) -> ssl.SSLContext:
        return MAKERS[side](ca=self.ca, certificate=self.certificate, key=self.key)

    def fault(self, side: str, spoilt: Path) -> str:
        with pytest.raises(errors.CredentialsUnusable) as caught:
            self.make(side)
        told = caught.value
        assert str(spoilt) in told.message
        assert told.remedy
        assert "\n" not in str(told)
        return str(told)


@pytest.fixture
def files(site: Site, tmp_path: Path, side: str) -> Files:
    stem = "server" if side == "server" else "viewer-client"
    copies = Files(tmp_path / "ca", tmp_path / "certificate", tmp_path / "key")
    shutil.copy(site.path("ca-cert"), copies.ca)
    shutil.copy(site.path(f"{stem}-cert"), copies.certificate)
    shutil.copy(site.path(f"{stem}-key"), copies.key)
    return copies


both_sides = pytest.mark.parametrize("side", ["server", "client"])


each_file = pytest.mark.parametrize("which", ["ca", "certificate", "key"])


@both_sides
def test_unspoilt_files_make_a_context(files: Files, side: str) -> None:
    assert isinstance(files.make(side), ssl.SSLContext)


@both_sides
def test_certificate_after_that_of_its_authority_is_told_the_order(files: Files, side: str) -> None:
    files.certificate.write_bytes(files.ca.read_bytes() + files.certificate.read_bytes())
    with pytest.raises(errors.CredentialsUnusable) as caught:
        files.make(side)
    assert f"to the first certificate of {files.certificate}" in caught.value.message
    assert "put the key's own certificate first there" in caught.value.remedy


@both_sides
def test_key_of_no_certificate_in_a_chain_is_not_told_the_order(
    files: Files, site: Site, side: str
) -> None:
    files.certificate.write_bytes(files.certificate.read_bytes() + files.ca.read_bytes())
    shutil.copy(site.path("admin-client-key"), files.key)
    with pytest.raises(errors.CredentialsUnusable) as caught:
        files.make(side)
    assert f"it does not belong to {files.certificate}" in caught.value.message
    assert "first" not in str(caught.value)


@both_sides
@each_file
def test_missing_file_is_named(files: Files, side: str, which: str) -> None:
    path: Path = getattr(files, which)
    path.unlink()
    where = "name the right file in the config" if side == "server" else "copy ca-cert.pem"
    with pytest.raises(errors.CredentialsUnusable, match=f"no such file; {where}"):
        files.make(side)
    assert "no such file" in files.fault(side, path)


@both_sides
@each_file
@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_path_that_no_file_can_have_is_named(
    files: Files, side: str, which: str, path: str
) -> None:
    spoilt = evolve(files, **{which: Path(path)})
    assert "no file can have that path" in spoilt.fault(side, Path(path))


@both_sides
@each_file
def test_directory_in_place_of_file_is_named(files: Files, side: str, which: str) -> None:
    path: Path = getattr(files, which)
    path.unlink()
    path.mkdir()
    assert "it is a directory" in files.fault(side, path)


@both_sides
@each_file
def test_pipe_in_place_of_file_does_not_hang(files: Files, side: str, which: str) -> None:
    path: Path = getattr(files, which)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in files.fault(side, path)


@both_sides
@each_file
@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x30\x82\x00\xff", b"\xff" * 2_000_000])
def test_file_that_is_not_pem_is_named(files: Files, side: str, which: str, content: bytes) -> None:
    path: Path = getattr(files, which)
    path.write_bytes(content)
    fault = files.fault(side, path)
    assert "no PEM block" in fault or "larger than" in fault


@both_sides
@each_file
def test_damaged_pem_is_named(files: Files, side: str, which: str) -> None:
    path: Path = getattr(files, which)
    lines = path.read_text().splitlines()
    for content in ("MIIB", "no base64 at all"):
        path.write_text("\n".join([lines[0], content, lines[-1], ""]))
        fault = files.fault(side, path)
        assert "damaged" in fault
        assert "None" not in fault


@pytest.mark.parametrize("side", ["server"])
@pytest.mark.parametrize("tag", [0x12, 0x16], ids=["NumericString", "IA5String"])
def test_ca_of_a_name_that_cannot_be_read_is_named(
    files: Files, side: str, tag: int, tmp_path: Path
) -> None:
    """OpenSSL takes it; the service would meet the fault when it warns of expiry."""
    init_authority(tmp_path / "other", [], now=NOW)
    other = x509.load_pem_x509_certificate((tmp_path / "other" / "ca-cert.pem").read_bytes())
    (attribute,) = other.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    name = str(attribute.value).encode()
    as_utf8 = bytes([0x0C, len(name)]) + name
    der = other.public_bytes(serialization.Encoding.DER)
    assert as_utf8 in der
    spoilt = der.replace(as_utf8, bytes([tag, len(name)]) + b"\xff" * len(name))
    with files.ca.open("a") as file:
        file.write(ssl.DER_cert_to_PEM_cert(spoilt))
    assert "damaged" in files.fault(side, files.ca)


@both_sides
def test_swapped_files_are_named(files: Files, side: str) -> None:
    files.certificate, files.key = files.key, files.certificate
    assert "no PEM block 'CERTIFICATE'" in files.fault(side, files.certificate)


@both_sides
def test_encrypted_key_is_named_and_nobody_is_asked(files: Files, side: str) -> None:
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    for form in (
        serialization.PrivateFormat.PKCS8,
        serialization.PrivateFormat.TraditionalOpenSSL,
    ):
        secret = serialization.BestAvailableEncryption(b"passphrase")
        files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, secret))
        assert "is encrypted" in files.fault(side, files.key)


@both_sides
@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_key_of_another_certificate_is_named(files: Files, side: str, kind: str) -> None:
    key = (
        ec.generate_private_key(ec.SECP256R1())
        if kind == "ec"
        else rsa.generate_private_key(public_exponent=65537, key_size=2048)
    )
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    assert f"does not belong to {files.certificate}" in files.fault(side, files.key)


@both_sides
@each_file
def test_file_that_may_not_be_read_is_named(
    files: Files, tmp_path: Path, side: str, which: str
) -> None:
    tmp_path.chmod(0o755)  # another user is to fail at the file, not on the way there
    for path in (files.ca, files.certificate, files.key):
        path.chmod(0o644)
    files.make(side)  # all imports happen now, while everything may be read
    spoilt: Path = getattr(files, which)
    spoilt.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        fault = files.fault(side, spoilt)
    finally:
        os.seteuid(user)
    assert "may not read it" in fault
    assert ("(and nobody else)" in fault) == (which == "key")


def server_fault(site: Site, stem: str) -> errors.CredentialsUnusable:
    with pytest.raises(errors.CredentialsUnusable) as caught:
        site.server(stem)
    # A new CA would lock out every client: it is for where the CA itself is of no use.
    is_ca = "CA certificate" in caught.value.message.split(":")[0]
    assert f"worker certs {'init' if is_ca else 'renew server'}" in caught.value.remedy
    return caught.value


def test_server_with_foreign_certificate_does_not_start(site: Site, stranger: Site) -> None:
    for what in ("cert", "key"):
        shutil.copy(stranger.path(f"server-{what}"), site.path(f"foreign-{what}"))
    told = server_fault(site, "foreign")
    assert f"{site.path('foreign-cert')}: it is not from the CA in" in told.message


@pytest.mark.parametrize(
    ("issued_at", "reason"),
    [(LONG_AGO, "it expired at 20"), (NOW + timedelta(days=2), "it is not valid before 20")],
)
def test_server_outside_its_validity_does_not_start(
    site: Site, issued_at: datetime, reason: str
) -> None:
    issued = site.authority.issue_server(["localhost"], now=issued_at, days=30)
    told = server_fault(site, site.add("untimely", issued))
    assert f"{site.path('untimely-cert')}: {reason}" in told.message


def test_server_of_expired_authority_does_not_start(tmp_path: Path) -> None:
    init_authority(tmp_path, [], now=LONG_AGO, days=30, ca_days=30)
    told = server_fault(Site(tmp_path, Authority.load(tmp_path)), "server")
    assert f"the CA certificate {tmp_path / 'ca-cert.pem'}: it expired at 20" in told.message


def test_server_with_client_certificate_does_not_start(site: Site) -> None:
    assert "not made for servers" in server_fault(site, "viewer-client").message


def test_server_without_host_name_does_not_start(site: Site) -> None:
    issued = issue(site, [(type_cn, "localhost")], ExtendedKeyUsageOID.SERVER_AUTH)
    assert "has no host name" in server_fault(site, site.add("bare", issued)).message
