"""What an administrator does with an authority: issue, renew and revoke, and what is refused."""

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from jobworker.errors import CredentialsUnusable, InvalidParams, NotFound
from jobworker.pki import administration
from jobworker.pki import registry as r
from jobworker.pki.administration import (
    init_authority,
    issue_client,
    issue_server,
    renew,
    revoke,
    write_list,
)
from jobworker.pki.authority import Authority
from jobworker.pki.registry import INDEX, LIST, CertificateEntry, read_registry

from .certificates import CERTIFICATES, FILES, NOW, read

LATER = NOW + timedelta(days=1)
EXPIRED = NOW + timedelta(days=400)


class Office:
    """An authority in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.authority = directory, Authority.load(directory)

    def issue(self, name: str, **options: object) -> CertificateEntry:
        given = {"role": "viewer", "now": NOW, **options}
        return issue_client(self.directory, self.authority, name=name, **given).entry  # type: ignore[arg-type]

    def entries(self) -> dict[str, CertificateEntry]:
        return {each.serial: each for each in read_registry(self.directory).certificates}

    def revoked(self) -> set[int]:
        content = (self.directory / LIST).read_bytes()
        return {each.serial_number for each in x509.load_pem_x509_crl(content)}

    def number_of_list(self) -> int:
        made = x509.load_pem_x509_crl((self.directory / LIST).read_bytes())
        return made.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


@pytest.fixture
def office(made: Path, tmp_path: Path) -> Office:
    shutil.copytree(made, tmp_path / "ca")
    return Office(tmp_path / "ca")


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- init -----------------------------------------------------------------------------------


def test_new_authority_has_its_certificates_in_the_index_and_an_empty_list(office: Office) -> None:
    assert sorted(content(office.directory)) == FILES
    entries = office.entries()
    assert [(each.kind, each.stem) for each in entries.values()] == [
        ("server", "server"),
        ("client", "admin-client"),
        ("client", "viewer-client"),
    ]
    issued = [read(office.directory, stem).serial_number for stem in CERTIFICATES[1:]]
    assert [int(serial, 16) for serial in entries] == issued
    hosts = next(iter(entries.values())).hosts
    assert hosts == ("localhost", "127.0.0.1", "::1", "worker1.example.org", "192.0.2.7")
    assert office.revoked() == set()
    assert office.number_of_list() == 1


def test_authority_is_not_made_over_another(office: Office) -> None:
    before = content(office.directory)
    with pytest.raises(CredentialsUnusable):
        init_authority(office.directory, [], now=NOW)
    assert content(office.directory) == before


# --- issue ----------------------------------------------------------------------------------


def test_issued_client_is_in_the_index_and_its_files_are_written(office: Office) -> None:
    made = issue_client(
        office.directory, office.authority, name="carol", role="viewer", now=NOW, days=5
    )
    assert made.files == (office.directory / "carol-key.pem", office.directory / "carol-cert.pem")
    assert all(path.exists() for path in made.files)
    certificate = read(office.directory, "carol")
    assert certificate.not_valid_after_utc == NOW + timedelta(days=5)
    assert office.entries()[made.entry.serial] == made.entry
    assert (made.entry.kind, made.entry.name, made.entry.role) == ("client", "carol", "viewer")


def test_files_may_be_written_elsewhere(office: Office, tmp_path: Path) -> None:
    made = issue_client(
        office.directory,
        office.authority,
        name="carol",
        role="viewer",
        now=NOW,
        out=tmp_path / "out",
    )
    assert {path.parent for path in made.files} == {tmp_path / "out"}
    assert not (office.directory / "carol-cert.pem").exists()
    assert made.entry.serial in office.entries()


def test_second_certificate_of_a_name_must_be_wanted(office: Office, tmp_path: Path) -> None:
    first = office.issue("carol")
    with pytest.raises(InvalidParams, match="there is a valid one") as refused:
        office.issue("carol")
    assert first.serial in refused.value.message
    assert "--again" in refused.value.remedy
    second = office.issue("carol", again=True, out=tmp_path / "out")
    assert second.serial != first.serial


@pytest.mark.parametrize("name", ["Carol", "CAROL", "\uff43arol"])
def test_name_that_looks_like_another_is_refused_even_if_wanted(office: Office, name: str) -> None:
    office.issue("carol")
    with pytest.raises(InvalidParams, match="it looks like 'carol'"):
        office.issue(name, again=True)


def test_name_of_no_valid_certificate_is_free(office: Office, tmp_path: Path) -> None:
    office.issue("carol")
    office.issue("carol", now=EXPIRED, out=tmp_path / "expired")
    revoke(office.directory, office.authority, "carol", now=EXPIRED)
    office.issue("Carol", now=EXPIRED)


def test_name_of_a_server_is_free(office: Office) -> None:
    server = next(each for each in office.entries().values() if each.kind == "server")
    office.issue(server.name)


def test_certificate_whose_files_cannot_be_written_is_not_in_the_index(office: Office) -> None:
    (office.directory / "carol-key.pem").touch()
    before = office.entries()
    with pytest.raises(CredentialsUnusable):
        office.issue("carol")
    assert office.entries() == before
    assert not (office.directory / "carol-cert.pem").exists()


def test_entry_is_on_the_disk_before_its_certificate(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bool]()

    def write_new(*_: object) -> None:
        seen.append(any(each.name == "carol" for each in office.entries().values()))

    monkeypatch.setattr(administration, "write_new", write_new)
    office.issue("carol")
    assert seen == [True]


def test_server_is_issued_for_its_hosts_alone(office: Office, tmp_path: Path) -> None:
    made = issue_server(
        office.directory, office.authority, ["a.example.org"], now=NOW, out=tmp_path / "out"
    )
    assert (made.entry.kind, made.entry.hosts) == ("server", ("a.example.org",))
    assert [path.name for path in made.files] == ["server-key.pem", "server-cert.pem"]
    assert made.entry.serial in office.entries()
    with pytest.raises(CredentialsUnusable):
        issue_server(office.directory, office.authority, ["a.example.org"], now=NOW)


@pytest.mark.parametrize("name", ["ca", "server", "-x", "a/b", "a b", "..", "-", "ä"])
def test_file_names_of_clients_are_safe_and_their_own(name: str) -> None:
    stem = administration._stem(name)
    assert stem not in ("ca", "server")
    assert not stem.startswith(("-", "."))
    assert "/" not in stem
    assert " " not in stem
    assert stem != administration._stem(f"{name}x")


def test_plain_name_is_its_file_name_and_changed_ones_differ() -> None:
    assert administration._stem("a.b_c@d-e") == "a.b_c@d-e"
    assert administration._stem("a b") != administration._stem("a/b")


# --- renew ----------------------------------------------------------------------------------


def test_successor_takes_the_place_of_the_files_and_the_old_one_stays_valid(
    office: Office,
) -> None:
    old = read(office.directory, "viewer-client")
    made = renew(office.directory, office.authority, "viewer-client", now=LATER, days=9)
    new = read(office.directory, "viewer-client")
    assert new.serial_number == int(made.entry.serial, 16) != old.serial_number
    assert new.public_key() != old.public_key()
    assert new.not_valid_after_utc == LATER + timedelta(days=9)
    assert (made.entry.name, made.entry.role) == ("viewer-client", "viewer")
    states = [each.state(LATER) for each in office.entries().values()]
    assert states == ["valid"] * 4


def test_successor_of_a_server_has_the_old_hosts_and_more(office: Office) -> None:
    old = next(each for each in office.entries().values() if each.kind == "server")
    made = renew(
        office.directory, office.authority, old.serial, now=LATER, hosts=["new.example.org"]
    )
    assert made.entry.hosts == (*old.hosts, "new.example.org")
    assert made.entry.kind == "server"


def test_hosts_are_for_servers(office: Office) -> None:
    with pytest.raises(InvalidParams, match="it is not a server's"):
        renew(office.directory, office.authority, "viewer-client", now=LATER, hosts=["a"])


def test_revoked_certificate_has_no_successor(office: Office) -> None:
    revoke(office.directory, office.authority, "viewer-client", now=NOW)
    with pytest.raises(InvalidParams, match="it was revoked") as refused:
        renew(office.directory, office.authority, "viewer-client", now=LATER)
    assert "worker certs issue" in refused.value.remedy


def test_unknown_certificate_is_not_renewed(office: Office) -> None:
    with pytest.raises(NotFound) as missing:
        renew(office.directory, office.authority, "carol", now=LATER)
    assert "file" not in missing.value.remedy


# --- revoke ---------------------------------------------------------------------------------


def test_all_certificates_of_a_name_are_revoked(office: Office) -> None:
    first = read(office.directory, "viewer-client").serial_number
    second = int(
        renew(office.directory, office.authority, "viewer-client", now=NOW).entry.serial, 16
    )
    gone = revoke(
        office.directory, office.authority, "viewer-client", now=LATER, reason="superseded"
    )
    assert {int(each.serial, 16) for each in gone} == {first, second} == office.revoked()
    assert {(each.revoked_at, each.reason) for each in gone} == {(LATER, "superseded")}
    assert office.number_of_list() == 2


def test_one_certificate_is_revoked_by_its_serial(office: Office) -> None:
    old = read(office.directory, "viewer-client").serial_number
    renew(office.directory, office.authority, "viewer-client", now=NOW)
    (gone,) = revoke(office.directory, office.authority, r.serial_text(old), now=LATER)
    assert office.revoked() == {old}
    assert gone.reason is None


def test_revocation_is_not_made_twice(office: Office) -> None:
    (first,) = revoke(
        office.directory, office.authority, "viewer-client", now=NOW, reason="superseded"
    )
    again = revoke(
        office.directory, office.authority, "viewer-client", now=LATER, reason="keyCompromise"
    )
    assert again == ()
    assert office.entries()[first.serial] == first


@pytest.mark.parametrize("lost", [False, True])
def test_certificate_is_revoked_by_its_file_also_without_the_index(
    office: Office, *, lost: bool
) -> None:
    if lost:
        (office.directory / INDEX).unlink()
    path = office.directory / "viewer-client-cert.pem"
    (gone,) = revoke(office.directory, office.authority, path, now=LATER)
    serial = read(office.directory, "viewer-client").serial_number
    assert int(gone.serial, 16) == serial
    assert office.revoked() == {serial}
    assert office.entries()[gone.serial].revoked_at == LATER


def test_later_revocation_keeps_the_earlier_ones_also_without_the_index(office: Office) -> None:
    revoke(office.directory, office.authority, "viewer-client", now=NOW)
    before = office.revoked()
    (office.directory / INDEX).unlink()
    path = office.directory / "admin-client-cert.pem"
    revoke(office.directory, office.authority, path, now=LATER)
    assert office.revoked() > before


def test_file_revokes_its_certificate_alone(office: Office) -> None:
    old = read(office.directory, "viewer-client").serial_number
    path = office.directory / "old.pem"
    shutil.copy(office.directory / "viewer-client-cert.pem", path)
    renew(office.directory, office.authority, "viewer-client", now=NOW)
    revoke(office.directory, office.authority, path, now=LATER)
    assert office.revoked() == {old}


@pytest.mark.parametrize(
    ("which", "words"),
    [("own", "it is the CA's own"), ("other", "this CA has not signed it")],
)
def test_file_of_another_authority_is_refused(
    office: Office, tmp_path: Path, which: str, words: str
) -> None:
    path = office.directory / "ca-cert.pem"
    if which == "other":
        init_authority(tmp_path / "other", [], now=NOW)
        path = tmp_path / "other" / "viewer-client-cert.pem"
    before = content(office.directory)
    with pytest.raises(InvalidParams, match=words) as refused:
        revoke(office.directory, office.authority, path, now=LATER)
    assert "--dir" in refused.value.remedy
    assert content(office.directory) == before


def test_unknown_name_may_be_a_file(office: Office) -> None:
    with pytest.raises(NotFound, match="'carol'") as missing:
        revoke(office.directory, office.authority, "carol", now=LATER)
    assert "or name the certificate's file" in missing.value.remedy


def test_new_list_keeps_what_was_revoked(office: Office) -> None:
    revoke(office.directory, office.authority, "viewer-client", now=NOW)
    (office.directory / INDEX).unlink()
    before = office.revoked()
    assert write_list(office.directory, office.authority, now=LATER) == office.directory / LIST
    assert office.revoked() == before != set()


# --- one call at a time ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda o: issue_client(o.directory, o.authority, name="c", role="viewer", now=NOW),
        lambda o: issue_server(o.directory, o.authority, ["a"], now=NOW, out=o.directory / "out"),
        lambda o: renew(o.directory, o.authority, "viewer-client", now=NOW),
        lambda o: revoke(o.directory, o.authority, "viewer-client", now=NOW),
        lambda o: write_list(o.directory, o.authority, now=NOW),
    ],
    ids=["issue", "server", "renew", "revoke", "list"],
)
def test_index_is_read_and_written_under_one_lock(
    office: Office, monkeypatch: pytest.MonkeyPatch, call: Callable[[Office], object]
) -> None:
    from .test_registry import is_locked

    seen, really = list[bool](), r.read_registry

    def read_registry(directory: Path) -> r.Registry:
        seen.append(is_locked(directory))
        return really(directory)

    monkeypatch.setattr(r, "read_registry", read_registry)
    call(office)
    assert seen == [True]
    assert not is_locked(office.directory)
