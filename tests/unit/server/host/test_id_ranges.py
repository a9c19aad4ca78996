"""The ids of a service and its jobs: no other service, process, user or namespace has them."""

import grp
import os
import pwd
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from attrs import evolve

from jobworker.config.settings import FIRST_UID, LAST_UID, Settings
from jobworker.errors import ConfigError
from jobworker.sandbox.user_namespaces import IDS_PER_JOB
from jobworker.server.host import id_ranges
from jobworker.server.host.id_ranges import (
    LEAVING_SECONDS,
    IdRange,
    LockedIds,
    job_ids,
    lock_ids,
    lock_own_id,
    own_id,
    places_of,
    span_of,
)

FIRST = FIRST_UID
JOBS = IdRange(FIRST, FIRST + 4 * IDS_PER_JOB - 1)
OWN = id_ranges._OWN
WAIT_SECONDS = id_ranges._LOCKED_SECONDS


def settings(first: int, jobs: int = 3, spares: int = 1) -> Settings:
    plain = Settings()
    return evolve(
        plain,
        sandbox=evolve(plain.sandbox, first_uid=first, spares=spares),
        worker=evolve(plain.worker, max_concurrent_jobs=jobs),
    )


class Host:
    """The other users of ids, and the time; locks are the kernel's own."""

    def __init__(self) -> None:
        self.users = list[tuple[int, IdRange]]()
        self.now = 0.0
        self.on_sleep: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(id_ranges, "LOCK_FILE", tmp_path / "ids")
    monkeypatch.setattr(id_ranges, "time", host)
    monkeypatch.setattr(id_ranges, "_users", lambda: iter(host.users))
    monkeypatch.setattr(id_ranges, "_is_known", lambda _: False)
    return host


@pytest.fixture
def keep() -> Iterator[Callable[[LockedIds], int]]:
    """Keeps locks until the test's end, as a launcher does: their first ids."""
    with ExitStack() as held:

        def keep(locked: LockedIds) -> int:
            held.callback(os.close, locked.descriptor)
            return locked.first

        yield keep


Keep = Callable[[LockedIds], int]


# --- arithmetic -----------------------------------------------------------------------------


def test_range_has_both_of_its_ends() -> None:
    span = IdRange(5, 7)
    assert [one in span for one in (4, 5, 7, 8)] == [False, True, True, False]
    assert "5" not in span


@pytest.mark.parametrize(
    ("first", "last", "overlaps"),
    [(1, 4, False), (1, 5, True), (7, 9, True), (8, 9, False), (6, 6, True), (1, 9, True)],
)
def test_ranges_overlap_from_the_first_id_in_common(
    first: int, last: int, *, overlaps: bool
) -> None:
    assert IdRange(5, 7).overlaps(IdRange(first, last)) is overlaps
    assert IdRange(first, last).overlaps(IdRange(5, 7)) is overlaps


def test_jobs_and_spares_have_a_range_each() -> None:
    assert places_of(settings(FIRST, jobs=3, spares=1)) == 4
    assert places_of(settings(FIRST, jobs=3, spares=9)) == 6, "no more spares than jobs"
    assert job_ids(settings(FIRST)) == JOBS


def test_span_has_an_id_for_each_gateway_and_one_more() -> None:
    assert span_of(FIRST, 4) == IdRange(FIRST, JOBS.last + 5)


# --- ids that the configuration names -------------------------------------------------------


def test_ids_of_the_configuration_are_locked(host: Host, keep: Keep) -> None:
    assert keep(lock_ids(settings(FIRST))) == FIRST
    assert keep(lock_ids(settings(span_of(FIRST, 4).last + 1))) == span_of(FIRST, 4).last + 1


def test_overlap_of_one_id_is_refused(host: Host, keep: Keep) -> None:
    keep(lock_ids(settings(FIRST)))
    before = os.listdir("/proc/self/fd")
    span = span_of(FIRST, 4)
    with pytest.raises(ConfigError) as refused:
        lock_ids(settings(span.last))
    assert f"another service has {span.first} to {span.last}" in refused.value.message
    assert "or 0 for a range that is free" in refused.value.remedy
    assert host.now == pytest.approx(WAIT_SECONDS, abs=0.1)
    assert os.listdir("/proc/self/fd") == before


def test_lock_lasts_as_long_as_a_duplicate_of_it(host: Host) -> None:
    first = lock_ids(settings(FIRST))
    again = os.dup(first.descriptor)
    os.close(first.descriptor)
    with pytest.raises(ConfigError):
        lock_ids(settings(FIRST))
    os.close(again)
    os.close(lock_ids(settings(FIRST)).descriptor)


def test_service_that_exits_is_waited_for(host: Host, keep: Keep) -> None:
    first = lock_ids(settings(FIRST))

    def leave() -> None:
        os.close(first.descriptor)
        host.on_sleep = lambda: None

    host.on_sleep = leave
    assert keep(lock_ids(settings(FIRST))) == FIRST


def test_jobs_of_a_killed_launcher_are_waited_for(host: Host, keep: Keep) -> None:
    host.users = [(7, IdRange(JOBS.last, JOBS.last))]
    with pytest.raises(ConfigError, match=f"process 7 has {JOBS.last} to {JOBS.last}"):
        lock_ids(settings(FIRST))
    assert host.now == pytest.approx(LEAVING_SECONDS, abs=0.1)
    host.on_sleep = host.users.clear
    assert keep(lock_ids(settings(FIRST))) == FIRST


def test_ids_after_those_of_jobs_may_be_of_an_earlier_service(host: Host, keep: Keep) -> None:
    host.users = [(7, IdRange(JOBS.last + 1, JOBS.last + 1)), (8, IdRange(1, FIRST - 1))]
    assert keep(lock_ids(settings(FIRST))) == FIRST
    assert host.now == 0


def test_file_that_cannot_be_locked_is_named(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(id_ranges, "LOCK_FILE", tmp_path / "missing" / "ids")
    with pytest.raises(ConfigError, match="cannot lock the ids of jobs") as refused:
        lock_ids(settings(FIRST))
    assert str(tmp_path / "missing") in refused.value.remedy


def test_link_in_place_of_the_file_is_not_followed(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(id_ranges, "LOCK_FILE", tmp_path / "link")
    with pytest.raises(ConfigError):
        lock_ids(settings(FIRST))
    assert not (tmp_path / "elsewhere").exists()


def test_file_is_its_owners_alone_and_not_inherited(host: Host, tmp_path: Path) -> None:
    locked = lock_ids(settings(FIRST))
    assert (tmp_path / "ids").stat().st_mode & 0o777 == 0o600
    assert not os.get_inheritable(locked.descriptor)
    os.close(locked.descriptor)


# --- free ids -------------------------------------------------------------------------------


def test_free_range_is_the_last_one_before_the_services_own_ids(host: Host, keep: Keep) -> None:
    size = span_of(0, 4).last
    first = keep(lock_ids(settings(0)))
    assert first % IDS_PER_JOB == 0
    assert first + size <= OWN.first - 1 < first + size + IDS_PER_JOB


def test_free_ranges_do_not_overlap(host: Host, keep: Keep) -> None:
    spans = [span_of(keep(lock_ids(settings(0))), 4) for _ in range(5)]
    assert not any(one.overlaps(other) for one in spans for other in spans if one is not other)
    assert spans == sorted(spans, key=lambda span: -span.first)


def test_ids_that_a_process_or_namespace_has_are_passed_over(host: Host, keep: Keep) -> None:
    first = lock_ids(settings(0))
    os.close(first.descriptor)
    used = IdRange(first.first + 5, first.first + 5)
    host.users = [(7, used)]
    span = span_of(keep(lock_ids(settings(0))), 4)
    assert not span.overlaps(used)
    assert used.first - span.last <= IDS_PER_JOB, "the next free one"


def test_second_area_serves_where_the_first_is_full(host: Host, keep: Keep) -> None:
    host.users = [(7, IdRange(FIRST_UID, LAST_UID))]
    assert keep(lock_ids(settings(0))) == 1 << 31
    span = span_of(1 << 31, 4)
    second = keep(lock_ids(settings(0)))
    assert second > span.last
    assert second % IDS_PER_JOB == 0


def test_first_area_is_used_to_its_first_id(host: Host, keep: Keep) -> None:
    host.users = [(7, IdRange(span_of(FIRST_UID, 4).last + 1, LAST_UID))]
    assert FIRST_UID % IDS_PER_JOB == 0
    assert keep(lock_ids(settings(0))) == FIRST_UID


def test_host_without_free_ids_is_told_so(host: Host) -> None:
    host.users = [(7, IdRange(1, (1 << 32) - 3))]
    with pytest.raises(ConfigError, match=r"cannot find \d+ ids that are free") as refused:
        lock_ids(settings(0))
    assert "lower worker.max_concurrent_jobs" in refused.value.remedy


# --- the service's own id -------------------------------------------------------------------


def test_own_id_follows_from_the_real_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert own_id(tmp_path / "link") == own_id(tmp_path / "real")
    assert own_id(tmp_path / "real") != own_id(tmp_path)
    assert own_id(tmp_path) in OWN
    assert own_id(Path("/var/lib/jobworker")) == 2_146_532_510, "files of earlier versions have it"


def test_service_has_the_id_of_its_path(host: Host, keep: Keep, tmp_path: Path) -> None:
    assert keep(lock_own_id(tmp_path, JOBS)) == own_id(tmp_path)
    assert host.now == 0


@pytest.mark.parametrize("holder", ["service", "process", "user"])
def test_own_id_that_others_have_is_the_next_one(
    host: Host, keep: Keep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: str
) -> None:
    wanted = own_id(tmp_path)
    if holder == "service":
        keep(lock_own_id(tmp_path, JOBS))
    elif holder == "process":
        host.users = [(7, IdRange(wanted, wanted))]
    else:
        monkeypatch.setattr(id_ranges, "_is_known", lambda uid: uid == wanted)
    assert keep(lock_own_id(tmp_path, JOBS)) == wanted + 1
    assert host.now == pytest.approx(WAIT_SECONDS, abs=0.1), "it may be about to exit"


def test_own_id_of_a_service_that_exits_is_waited_for(
    host: Host, keep: Keep, tmp_path: Path
) -> None:
    host.users = [(7, IdRange(own_id(tmp_path), own_id(tmp_path)))]
    host.on_sleep = host.users.clear
    assert keep(lock_own_id(tmp_path, JOBS)) == own_id(tmp_path)


def test_own_id_is_none_of_the_jobs(host: Host, keep: Keep, tmp_path: Path) -> None:
    wanted = own_id(tmp_path)
    jobs = IdRange(wanted - IDS_PER_JOB + 1, wanted)
    span = span_of(jobs.first, 1)
    assert span.last > wanted
    assert keep(lock_own_id(tmp_path, jobs)) == span.last + 1
    assert host.now == 0, "its own jobs' ids come free never"


def test_search_for_an_own_id_begins_anew_at_the_first_one(
    host: Host, keep: Keep, tmp_path: Path
) -> None:
    host.users = [(7, IdRange(own_id(tmp_path), OWN.last))]
    assert keep(lock_own_id(tmp_path, JOBS)) == OWN.first


def test_own_ids_that_all_are_taken_are_replaced_by_those_elsewhere(
    host: Host, keep: Keep, tmp_path: Path
) -> None:
    host.users = [(7, OWN)]
    assert keep(lock_own_id(tmp_path, JOBS)) == id_ranges._OWN_ELSEWHERE.first
    host.users = [(7, OWN), (8, id_ranges._OWN_ELSEWHERE)]
    with pytest.raises(ConfigError, match="cannot find an id for the service's own") as refused:
        lock_own_id(tmp_path, JOBS)
    assert "useradd" in refused.value.remedy


# --- who has ids ----------------------------------------------------------------------------


def test_users_and_groups_of_the_host_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: int) -> None:
        raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(grp, "getgrgid", missing)
        assert id_ranges._is_known(0), "a user"
    monkeypatch.setattr(pwd, "getpwuid", missing)
    assert id_ranges._is_known(0), "a group"
    monkeypatch.setattr(grp, "getgrgid", missing)
    assert not id_ranges._is_known(0)


def test_processes_have_their_own_id_and_what_their_namespaces_map(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a played /proc: nothing but root's own, a user's, a namespace's and one that ended."""
    whole, own = "         0          0 4294967295\n", "0 900000 65536\n"
    maps = {
        "1": own,
        "2": own,
        "6": whole,
        "3": "0 100000 65536\n65536 5 2\n",
        "self": own,
        "4": None,
    }
    owners = {"1": 0, "2": 1000, "3": 100_000, "4": 2000, "6": 0}
    other = "         0          0 65536\n1000 2000 1\n"
    maps["5"], owners["5"] = other, 0

    class ProcPath:
        def __init__(self, path: str) -> None:
            self._name = path.split("/")[2]

        def read_text(self) -> str:
            text = maps[self._name]
            if text is None:
                raise ProcessLookupError
            return text

    class Status:
        def __init__(self, uid: int) -> None:
            self.st_uid = uid

    monkeypatch.setattr(id_ranges, "Path", ProcPath)
    monkeypatch.setattr(os, "listdir", lambda _: [*owners, "cmdline", "self"])
    monkeypatch.setattr(os, "stat", lambda path: Status(owners[path.rpartition("/")[2]]))
    assert list(id_ranges._users()) == [
        (2, IdRange(1000, 1000)),
        (3, IdRange(100_000, 100_000)),
        (3, IdRange(100_000, 165_535)),
        (3, IdRange(5, 6)),
        (4, IdRange(2000, 2000)),
        (5, IdRange(2000, 2000)),
    ]
