"""Revocation lists: which are refused and why, and whom they shut out."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from attrs import define, evolve
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from jobworker.errors import CredentialsUnusable
from jobworker.pki.authority import Authority
from jobworker.pki.credentials import PemFile
from jobworker.pki.revocation import Verifier, list_warnings, read_all, read_lists
from jobworker.pki.server_files import CRL_REMEDY, ServerFiles

NOW = datetime.now(UTC)  # the verifier goes by the clock
DAY = timedelta(days=1)


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def made_list(authority: Authority, *serials: int, now: datetime = NOW, number: int = 1) -> bytes:
    builder = x509.RevokedCertificateBuilder()
    revoked = [builder.serial_number(each).revocation_date(now).build() for each in serials]
    return authority.revocation_list(revoked, number, now=now)


@define
class Site:
    """An authority, a certificate of its server, and the server's files."""

    authority: Authority
    server: x509.Certificate

    def files(
        self, crl: bytes | None, *, ca: bytes | None = None, certificate: bytes | None = None
    ) -> ServerFiles:
        def file(name: str, content: bytes) -> PemFile:
            return PemFile(Path(f"/{name}.pem"), content)

        return ServerFiles(
            ca=file("ca", ca or pem(self.authority.root.certificate)),
            certificate=file("server", certificate or pem(self.server)),
            key=file("key", b""),
            crl=None if crl is None else file("crl", crl),
        )


@pytest.fixture(scope="module")
def site() -> Site:
    authority = Authority.create(now=NOW)
    return Site(authority, authority.issue_server(["localhost"], now=NOW).certificate)


@pytest.fixture(scope="module")
def stranger() -> Authority:
    """An authority of another name."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stranger")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = Authority.create(now=NOW)
    return evolve(plain, root=evolve(plain.root, certificate=certificate, key=key))


def refusal(files: ServerFiles, now: datetime = NOW) -> str:
    with pytest.raises(
        CredentialsUnusable, match=r"cannot use the revocation list /crl\.pem: "
    ) as e:
        read_lists(files, now)
    assert e.value.remedy == CRL_REMEDY
    return e.value.message


# --- which lists are taken ------------------------------------------------------------------


def test_server_without_a_file_has_no_lists(site: Site) -> None:
    lists = read_lists(site.files(None), NOW)
    assert (lists.all, lists.reaches_up, lists.unproven) == ((), False, ())


def test_sound_list_is_taken(site: Site) -> None:
    lists = read_lists(site.files(made_list(site.authority, 7)), NOW)
    assert [revoked.serial_number for each in lists.all for revoked in each] == [7]
    assert lists.reaches_up
    assert lists.unproven == ()


def test_list_is_taken_within_its_validity_alone(site: Site) -> None:
    content = made_list(site.authority)
    made = x509.load_pem_x509_crl(content)
    assert made.next_update_utc is not None
    files = site.files(content)
    assert read_lists(files, made.last_update_utc).all
    assert read_lists(files, made.next_update_utc - timedelta(seconds=1)).all
    assert "it is not valid before" in refusal(files, made.last_update_utc - timedelta(seconds=1))
    assert "it expired at" in refusal(files, made.next_update_utc)


@pytest.mark.parametrize("content", [b"", b"no list"])
def test_file_without_a_list_is_refused(site: Site, content: bytes) -> None:
    assert "it contains no list of the CA" in refusal(site.files(content))


def test_damaged_list_is_refused(site: Site) -> None:
    assert "it is damaged" in refusal(site.files(b"-----BEGIN X509 CRL-----\nAAAA\n"))


def test_list_that_another_key_signed_in_the_name_of_the_ca_is_refused(site: Site) -> None:
    other = Authority.create(now=NOW)
    forged = evolve(other, root=evolve(other.root, certificate=site.authority.root.certificate))
    assert "its signature is not the CA's" in refusal(site.files(made_list(forged)))


def test_one_bad_list_among_good_ones_is_refused(site: Site) -> None:
    early = made_list(site.authority, now=NOW + 10 * DAY)
    for content in (made_list(site.authority) + early, early + made_list(site.authority)):
        assert "it is not valid before" in refusal(site.files(content))


def test_each_trusted_ca_must_have_a_list(site: Site, stranger: Authority) -> None:
    both = pem(site.authority.root.certificate, stranger.root.certificate)
    told = refusal(site.files(made_list(site.authority), ca=both))
    assert told.endswith("it contains no list of the CA CN=stranger")
    whole = made_list(site.authority) + made_list(stranger)
    lists = read_lists(site.files(whole, ca=both), NOW)
    assert len(lists.all) == 2
    assert lists.reaches_up


def test_list_of_another_ca_alone_is_named_in_the_refusal(site: Site, stranger: Authority) -> None:
    assert "; it is from another CA (CN=stranger)" in refusal(site.files(made_list(stranger)))


def test_list_of_an_unknown_ca_is_warned_about(site: Site, stranger: Authority) -> None:
    files = site.files(made_list(site.authority) + made_list(stranger))
    assert len(read_lists(files, NOW).unproven) == 1
    (warning,) = list_warnings(files, NOW)
    assert "CN=stranger in /crl.pem" in warning
    known = site.files(
        made_list(site.authority) + made_list(stranger),
        certificate=pem(site.server, stranger.root.certificate),
    )
    assert list_warnings(known, NOW) == (), "its certificate is in the server's chain"
    assert list_warnings(site.files(None), NOW) == ()


def test_list_of_the_servers_chain_is_checked(site: Site, stranger: Authority) -> None:
    other = Authority.create(now=NOW)
    forged = evolve(other, root=evolve(other.root, certificate=stranger.root.certificate))
    files = site.files(
        made_list(site.authority) + made_list(forged),
        certificate=pem(site.server, stranger.root.certificate),
    )
    assert "its signature is not the CA's" in refusal(files)


def test_every_list_of_a_file_is_read(site: Site) -> None:
    content = b"a comment\n" + made_list(site.authority, 1) + made_list(site.authority, 2)
    found = read_all(PemFile(Path("/crl.pem"), content))
    assert [revoked.serial_number for each in found for revoked in each] == [1, 2]


# --- whom they shut out ---------------------------------------------------------------------


def fault(site: Site, crl: bytes | None, *chain: bytes) -> str | None:
    return Verifier.of(site.files(crl), NOW).fault(chain)


def test_revoked_client_is_found_and_no_other(site: Site) -> None:
    one = site.authority.issue_client("alice", "viewer", now=NOW).certificate
    other = site.authority.issue_client("bob", "viewer", now=NOW).certificate
    crl = made_list(site.authority, one.serial_number)
    assert fault(site, crl, der(one)) == "it has been revoked"
    assert fault(site, crl, der(other)) is None
    assert fault(site, None, der(one)) is None


def test_client_that_has_expired_is_found(site: Site) -> None:
    old = Authority.create(now=NOW - 9 * DAY)
    server = old.issue_server(["localhost"], now=NOW - 9 * DAY).certificate
    one = old.issue_client("alice", "viewer", now=NOW - 9 * DAY, days=1).certificate
    assert fault(Site(old, server), None, der(one)) == "it has expired"


def test_client_of_another_authority_is_found(site: Site, stranger: Authority) -> None:
    one = stranger.issue_client("alice", "viewer", now=NOW).certificate
    told = "it is not from the server's CA any more"
    assert fault(site, None, der(one)) == told
    assert fault(site, None, der(one), der(stranger.root.certificate)) is not None


@pytest.mark.parametrize("chain", [(b"nothing",), ()])
def test_chain_that_cannot_be_read_is_a_fault(site: Site, chain: tuple[bytes, ...]) -> None:
    assert fault(site, None, *chain) == "it cannot be read"


def test_verifier_is_not_made_of_an_unusable_list(site: Site) -> None:
    with pytest.raises(CredentialsUnusable):
        Verifier.of(site.files(b""), NOW)
