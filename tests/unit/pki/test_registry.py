"""The index of certificates and the list made of it: who is found, and what stays revoked."""

import fcntl
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from attrs import evolve
from cryptography import x509

from jobworker.errors import CredentialsUnusable, NotFound
from jobworker.pki.authority import Authority
from jobworker.pki.registry import (
    INDEX,
    LIST,
    REASONS,
    CertificateEntry,
    Registry,
    entry_of,
    files_of,
    index_bytes,
    locked,
    read_registry,
    serial_text,
    write_index,
)

from .certificates import NOW, read

HOUR = timedelta(hours=1)


def entry(serial: str, name: str = "alice", **fields: object) -> CertificateEntry:
    plain: dict[str, object] = {
        "kind": "client",
        "stem": name,
        "not_before": NOW,
        "not_after": NOW + HOUR,
        "fingerprint": "00",
    }
    return CertificateEntry(serial=serial, name=name, **{**plain, **fields})  # type: ignore[arg-type]


def registry(*entries: CertificateEntry) -> Registry:
    return Registry(certificates=entries)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create(now=NOW)


# --- entries --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "revoked", "state"),
    [
        (NOW, False, "valid"),
        (NOW + HOUR - timedelta.resolution, False, "valid"),
        (NOW + HOUR, False, "expired"),
        (NOW, True, "revoked"),
        (NOW + HOUR, True, "revoked"),
    ],
)
def test_state_of_a_certificate(at: object, state: str, *, revoked: bool) -> None:
    one = entry("01", revoked_at=NOW if revoked else None)
    assert one.state(at) == state  # type: ignore[arg-type]


def test_serial_is_written_in_whole_bytes() -> None:
    assert [serial_text(number) for number in (0x1, 0xAB, 0xABC)] == ["01", "AB", "0ABC"]


def test_entry_tells_of_its_certificate(made: Path) -> None:
    certificate = read(made, "admin-client")
    one = entry_of(certificate, "client", "stem")
    assert (one.kind, one.stem, one.name, one.role) == ("client", "stem", "admin-client", "admin")
    assert one.hosts == ()
    assert int(one.serial, 16) == certificate.serial_number
    assert (one.not_before, one.not_after) == (
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )
    assert len(one.fingerprint) == 64
    server = entry_of(read(made, "server"), "server", "server")
    assert server.hosts == ("localhost", "127.0.0.1", "::1", "worker1.example.org", "192.0.2.7")
    assert server.role == ""


# --- the registry ---------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["0ABC", "abc", "0a:bc", "ABC", "000ABC"])
def test_certificate_is_found_by_its_serial_in_every_form(wanted: str) -> None:
    one = entry("0ABC")
    assert registry(entry("01", "bob"), one).find(wanted) is one


def test_latest_certificate_of_a_name_is_found() -> None:
    entries = [entry("01"), entry("02"), entry("03", "bob")]
    assert registry(*entries).find("alice") is entries[1]


@pytest.mark.parametrize("wanted", ["carol", "Alice", "04"])
def test_other_certificates_are_not_found(wanted: str) -> None:
    with pytest.raises(NotFound, match=f"certificate '{wanted}'") as missing:
        registry(entry("01")).find(wanted)
    assert missing.value.remedy == "see worker certs list"
    with pytest.raises(NotFound) as missing:
        registry(entry("01")).find(wanted, or_file=True)
    assert "or name the certificate's file" in missing.value.remedy


def test_new_entry_comes_last_and_a_changed_one_stays_in_its_place() -> None:
    first, second = entry("01"), entry("02")
    both = registry(first).with_entry(second)
    assert both.certificates == (first, second)
    changed = evolve(first, revoked_at=NOW)
    assert both.with_entry(changed).certificates == (changed, second)


# --- the index ------------------------------------------------------------------------------


def test_index_is_read_as_it_was_written(tmp_path: Path) -> None:
    whole = evolve(registry(entry("01", revoked_at=NOW, reason="keyCompromise")), list_number=7)
    write_index(tmp_path, whole)
    assert read_registry(tmp_path) == whole
    assert (tmp_path / INDEX).stat().st_mode & 0o777 == 0o600


def test_missing_index_is_empty(tmp_path: Path) -> None:
    assert read_registry(tmp_path) == Registry()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "cannot read the message as JSON"),
        (b"\xff", "it is not UTF-8 text"),
        (b'{"list_number": "1"}', "list_number: must be an integer"),
        (b'{"other": 1}', "other"),
    ],
)
def test_damaged_index_is_named_with_what_is_lost_without_it(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(CredentialsUnusable, match="cannot use the index") as refused:
        read_registry(tmp_path)
    assert str(tmp_path / INDEX) in refused.value.message
    assert words in refused.value.message
    assert "restore it from a backup" in refused.value.remedy


def test_index_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).mkdir()
    with pytest.raises(CredentialsUnusable, match="it is a directory"):
        read_registry(tmp_path)


# --- the revocation list --------------------------------------------------------------------


def listed(content: bytes) -> dict[int, x509.RevokedCertificate]:
    return {each.serial_number: each for each in x509.load_pem_x509_crl(content)}


def made_list(
    authority: Authority, *entries: CertificateEntry, before: Path | None = None
) -> dict[int, x509.RevokedCertificate]:
    return listed(files_of(registry(*entries), authority, before, now=NOW)[LIST][0])


def test_list_has_the_revoked_certificates_with_time_and_reason(authority: Authority) -> None:
    found = made_list(
        authority,
        entry("01"),
        entry("02", revoked_at=NOW, reason="keyCompromise"),
        entry("03", revoked_at=NOW - HOUR),
        entry("04", revoked_at=NOW, reason="unspecified"),
    )
    assert set(found) == {2, 3, 4}
    assert found[3].revocation_date_utc == NOW - HOUR
    reason = found[2].extensions.get_extension_for_class(x509.CRLReason).value.reason
    assert reason is x509.ReasonFlags.key_compromise
    assert not list(found[3].extensions)
    assert not list(found[4].extensions), "RFC 5280, section 5.3.1: it should be absent"


def test_each_list_has_the_next_number_and_the_index_remembers_it(authority: Authority) -> None:
    before = evolve(registry(entry("01")), list_number=7)
    files = files_of(before, authority, None, now=NOW)
    made = x509.load_pem_x509_crl(files[LIST][0])
    assert made.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 8
    assert files[INDEX][0] == index_bytes(evolve(before, list_number=8))
    assert (files[INDEX][1], files[LIST][1]) == (0o600, 0o644)


def test_what_an_earlier_list_has_stays_revoked_without_the_index(
    authority: Authority, tmp_path: Path
) -> None:
    path = tmp_path / LIST
    path.write_bytes(
        files_of(registry(entry("02", revoked_at=NOW)), authority, None, now=NOW)[LIST][0]
    )
    assert set(made_list(authority, before=path)) == {2}
    found = made_list(
        authority,
        entry("02", revoked_at=NOW - HOUR, reason="superseded"),
        entry("03", revoked_at=NOW),
        before=path,
    )
    assert set(found) == {2, 3}
    assert found[2].revocation_date_utc == NOW - HOUR, "once, as the index has it"


def test_missing_earlier_list_is_none(authority: Authority, tmp_path: Path) -> None:
    assert made_list(authority, entry("01", revoked_at=NOW), before=tmp_path / LIST).keys() == {1}


def test_damaged_earlier_list_is_not_replaced_by_a_shorter_one(
    authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / LIST).write_bytes(b"damaged")
    with pytest.raises(CredentialsUnusable, match="cannot use the revocation list") as refused:
        made_list(authority, before=tmp_path / LIST)
    assert "restore it from a backup" in refused.value.remedy


def test_reasons_are_the_lasting_ones() -> None:
    assert "keyCompromise" in REASONS
    assert not {"removeFromCRL", "certificateHold"} & set(REASONS)


# --- the lock -------------------------------------------------------------------------------


def is_locked(directory: Path) -> bool:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_directory_is_locked_for_the_block(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), locked(tmp_path):
        assert is_locked(tmp_path)
        raise ZeroDivisionError
    assert not is_locked(tmp_path)


@pytest.mark.parametrize("name", ["missing", "file"])
def test_what_is_no_directory_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CredentialsUnusable, match=f"{name}: ") as refused, locked(tmp_path / name):
        pytest.fail("it is locked")
    assert "worker certs init" in refused.value.remedy
