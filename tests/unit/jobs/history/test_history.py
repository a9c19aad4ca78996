"""The history: what it was told is on the disk, and an id is handed out once."""

import os
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import apsw
import pytest
import trio
import trio.lowlevel
import trio.testing
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

import jobworker
from jobworker.errors import ConfigError, InternalError
from jobworker.jobs.history import search as history_search
from jobworker.jobs.history import writer as history_writer
from jobworker.jobs.history.history import History
from jobworker.jobs.history.job_note import make_note, read_note
from jobworker.jobs.history.reserved_space import ReservedSpace
from jobworker.jobs.history.schema import MIGRATIONS
from jobworker.jobs.history.search import Filter
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.lifecycle import LIVE, State
from jobworker.model.summary import without_bulk
from jobworker.sandbox.protocol.requests import MAX_JOB
from jobworker.serialization.convert import structure, unstructure
from jobworker.serialization.json_text import dumps, loads

from ...strategies import examples, record, records

NOW = datetime(2026, 2, 1, 9, 30, tzinfo=UTC)


@contextmanager
def opened(path: Path) -> Iterator[History]:
    history = History.open(path)
    try:
        yield history
    finally:
        history.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


@pytest.fixture
def commits() -> Iterator[list[None]]:
    """One entry for each transaction that any connection commits."""
    seen: list[None] = []

    def count() -> bool:
        seen.append(None)
        return False

    def hook(connection: apsw.Connection) -> None:
        connection.set_commit_hook(count)

    apsw.connection_hooks.append(hook)
    yield seen
    apsw.connection_hooks.remove(hook)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that refuses: no file grows beyond `size` (EFBIG, setrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def latest(history: History, *, limit: int, **wanted: object) -> list[JobRecord]:
    """A page of the history, as records."""
    page = await history.page(Filter(**wanted), limit)  # type: ignore[arg-type]
    return [structure(JobRecord, loads(text)) for _, text in page.records]


def ids_of(found: list[JobRecord]) -> list[int]:
    return [each.id for each in found]


# --- records --------------------------------------------------------------------------------


async def test_record_is_found_as_it_was_put(path: Path) -> None:
    with opened(path) as history:
        stored = record(history.take_id(), detail="é\n\0", spec=JobSpec(command=("a", "")))
        await history.put(stored)
        assert await history.get(stored.id) == stored
        assert await history.get(stored.id + 1) is None  # type: ignore[arg-type]


@examples(max_examples=10)
@given(st.lists(records.filter(lambda each: each.ended), max_size=10, unique_by=lambda r: r.id))
def test_any_records_are_found_again_after_reopening(
    tmp_path_factory: pytest.TempPathFactory, stored: list[JobRecord]
) -> None:
    path = tmp_path_factory.mktemp("history") / "history.db"

    async def put_all() -> None:
        with opened(path) as history:
            async with trio.open_nursery() as nursery:
                for each in stored:
                    nursery.start_soon(history.put, each)

    async def get_all() -> list[JobRecord | None]:
        with opened(path) as history:
            return [await history.get(each.id) for each in stored]

    trio.run(put_all)
    assert trio.run(get_all) == stored


@examples(max_examples=50)
@given(records.filter(lambda each: each.ended))
def test_removal_of_output_is_noted_once_and_changes_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, stored: JobRecord
) -> None:
    path = tmp_path_factory.mktemp("history") / "history.db"
    unknown = JobId(stored.id + 1)

    async def note() -> None:
        with opened(path) as history:
            await history.put(stored)
            told = stored.output_removed_at is not None
            assert await history.with_output() == ({} if told else {stored.id: stored.owner})
            await history.mark_output_removed([stored.id, unknown], NOW)
            await history.mark_output_removed([stored.id], NOW + timedelta(days=1))
            noted = evolve(stored, output_removed_at=stored.output_removed_at or NOW)
            assert await history.get(stored.id) == noted
            assert await history.get(unknown) is None  # what was removed does not come back
            assert await history.with_output() == {}

    trio.run(note)


async def test_changed_record_replaces_the_one_before(path: Path) -> None:
    with opened(path) as history:
        id_ = history.take_id()
        await history.put(record(id_, State.RUNNING))
        await history.put(record(id_, State.COMPLETED, exit_code=0))
        found = await history.get(id_)
        assert found is not None
        assert (found.state, found.exit_code) == (State.COMPLETED, 0)
        assert ids_of(await latest(history, limit=10)) == [id_]
        assert await latest(history, states={State.RUNNING}, limit=10) == []


async def test_latest_are_the_newest_first_and_paged_by_id(path: Path) -> None:
    with opened(path) as history:
        for state in (State.COMPLETED, State.FAILED, State.STOPPED, State.FAILED, State.RUNNING):
            await history.put(record(history.take_id(), state))
        assert ids_of(await latest(history, limit=10)) == [5, 4, 3, 2, 1]
        assert ids_of(await latest(history, limit=2)) == [5, 4]
        assert ids_of(await latest(history, limit=2, before=4)) == [3, 2]
        assert ids_of(await latest(history, limit=2, before=1)) == []
        failed = {State.FAILED}
        assert ids_of(await latest(history, states=failed, limit=10)) == [4, 2]
        assert ids_of(await latest(history, states=failed, limit=10, before=4)) == [2]
        assert ids_of(await latest(history, states=set(), limit=10)) == []


async def test_page_ends_early_where_records_are_large(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_search, "MAX_PAGE_BYTES", 10_000)
    with opened(path) as history:
        for _ in range(10):
            await history.put(record(history.take_id(), detail="x" * 4000))
        assert ids_of(await latest(history, limit=10)) == [10, 9, 8]
        monkeypatch.setattr(history_search, "MAX_PAGE_BYTES", 100)
        assert ids_of(await latest(history, limit=10)) == [10]


# --- ids ------------------------------------------------------------------------------------


def test_ids_begin_at_one_and_increase(path: Path) -> None:
    with opened(path) as history:
        assert history.next_id == 1
        assert [history.take_id() for _ in range(3)] == [1, 2, 3]
        assert history.next_id == 4


async def test_ids_are_never_used_again_across_reopening(path: Path) -> None:
    used: list[int] = []
    for _ in range(3):
        with opened(path) as history:
            for _ in range(2):
                id_ = history.take_id()
                await history.put(record(id_))
                used.append(id_)
    assert used == [1, 2, 3, 4, 5, 6]


async def test_ids_of_deleted_records_are_not_used_again(path: Path) -> None:
    with opened(path) as history:
        for _ in range(5):
            await history.put(record(history.take_id()))
    connection = apsw.Connection(str(path))
    connection.execute("DELETE FROM jobs WHERE id > 2")
    connection.close()
    with opened(path) as history:
        assert history.take_id() == 6


_CRASH = """
import os, signal, sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
import trio
from jobworker.jobs.history.history import History
from jobworker.jobs.history.schema import MIGRATIONS
from jobworker.model.job import JobRecord, JobSpec
from jobworker.model.lifecycle import State

async def main():
    now = datetime(2026, 1, 31, tzinfo=UTC)
    history = History.open(Path(sys.argv[1]))
    spec = JobSpec(command=("true",))
    for state in (State.COMPLETED, State.RUNNING):
        id_ = history.take_id()
        await history.put(JobRecord(id=id_, spec=spec, owner="a", state=state, created_at=now))
    os.kill(os.getpid(), signal.SIGKILL)

trio.run(main)
"""


async def test_what_was_put_survives_a_kill_at_once(path: Path) -> None:
    source = str(Path(jobworker.__file__).resolve().parent.parent)
    command = [sys.executable, "-c", _CRASH, str(path)]
    done = await trio.run_process(
        command, check=False, env={**os.environ, "PYTHONPATH": source}, capture_stderr=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with opened(path) as history:
        assert [each.id for each in history.unfinished] == [2]
        assert history.take_id() == 3
        found = await latest(history, limit=10)
        assert [each.state for each in found] == [State.RUNNING, State.COMPLETED]


# --- what an earlier service left -----------------------------------------------------------


async def test_unfinished_records_are_told_as_they_are_and_no_others(path: Path) -> None:
    before = {}
    with opened(path) as history:
        assert history.unfinished == ()
        for state in State:
            stored = record(history.take_id(), state)
            await history.put(stored)
            before[stored.id] = stored
    with opened(path) as history:
        unfinished = {each.id: each for each in history.unfinished}
        assert unfinished == {i: each for i, each in before.items() if each.state in LIVE}
        for id_, stored in before.items():
            assert await history.get(id_) == stored


async def test_large_request_of_an_unfinished_job_is_not_read_at_the_start(path: Path) -> None:
    many = {f"V{number}": "x" * 90 for number in range(100)}
    labels = {f"z{number}": "é" * 255 for number in range(9, 0, -1)}
    parts: list[dict[str, object]] = [
        {"environment": many},
        {"environment": many, "labels": labels},
        {"secret_environment": {name * 20: "***" for name in many}, "name": "n"},
        {"command": ("echo", "x" * 9000), "environment": {"A": "b"}},
    ]
    with opened(path) as history:
        requests = [JobSpec(**{"command": ("true",), **part}) for part in parts]  # type: ignore[arg-type]
        requests.append(JobSpec(command=("true",), environment={"A": "b"}, labels=labels))
        stored = [record(history.take_id(), State.PENDING, spec=spec) for spec in requests]
        for each in stored:
            await history.put(each)
    with closing(apsw.Connection(str(path))) as connection:  # it could not be read
        query = "UPDATE specs SET spec = json_set(spec, '$.environment', ?) WHERE job < 5"
        connection.execute(query, ("x" * 9000,))
    with opened(path) as history:
        assert history.unfinished == tuple(map(without_bulk, stored))
        assert history.unfinished[1].spec.labels == labels
        assert "secret_environment" in history.unfinished[2].abridged
        assert history.unfinished[4] == stored[4]


def test_ids_that_are_passed_over_are_not_given(path: Path) -> None:
    with opened(path) as history:
        history.pass_over(JobId(7))
        assert history.take_id() == 8
        history.pass_over(JobId(3))
        assert history.take_id() == 9


def test_id_of_which_there_is_something_else_is_left_out_alone(path: Path) -> None:
    with opened(path) as history:
        for strange in (2, 3, MAX_JOB):
            history.never_give(JobId(strange))
        assert [history.take_id() for _ in range(3)] == [1, 4, 5]


def test_ids_that_are_used_up_are_refused_by_name(path: Path) -> None:
    with opened(path) as history:
        history.pass_over(JobId(MAX_JOB - 1))
        assert history.take_id() == MAX_JOB
        for _ in range(2):
            with pytest.raises(InternalError, match="the last one was") as refused:
                history.take_id()
            assert "last-id" in refused.value.remedy


@pytest.mark.parametrize("number", ["9007199254740991", str(MAX_JOB + 1), "9" * 40, "-1"])
def test_number_that_is_no_id_is_not_heeded_and_told(
    path: Path, number: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.with_name("last-id").write_text(f"{number}\n")
    with opened(path) as history:
        assert history.take_id() == 1
    assert "which is no job's id" in caplog.text


# --- writing --------------------------------------------------------------------------------


async def test_put_returns_once_others_can_read_it(path: Path) -> None:
    with opened(path) as history:
        await history.put(record(history.take_id()))
        other = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        assert other.execute("SELECT count(*) FROM jobs").get == 1
        other.close()


@contextmanager
def write_lock(path: Path) -> Iterator[apsw.Connection]:
    """Hold the database's write lock, as a backup by another program does."""
    with closing(apsw.Connection(str(path))) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other
        if other.in_transaction:
            other.execute("ROLLBACK")


async def until_waiting(count: int, nursery: trio.Nursery) -> None:
    """Wait until all of a nursery's tasks wait for the disk."""
    while len(nursery.child_tasks) < count:
        await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()


async def test_writes_of_the_same_moment_share_a_commit(path: Path, commits: list[None]) -> None:
    with opened(path) as history, write_lock(path) as other:
        commits.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(history.put, record(history.take_id()))
            await until_waiting(100, nursery)
            other.execute("ROLLBACK")
        # What the writer took before the lock kept it, and all that came meanwhile.
        assert 1 <= len(commits) <= 2
        assert len(await latest(history, limit=1000)) == 100


async def test_put_waits_for_a_backup_that_holds_the_lock(path: Path) -> None:
    with opened(path) as history, write_lock(path) as other:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(history.put, record(history.take_id()))
            await trio.sleep(0.2)  # a put without patience failed after 5 ms
            assert await latest(history, limit=10) == []  # and readers go on
            other.execute("COMMIT")
        assert ids_of(await latest(history, limit=10)) == [1]


async def test_lock_that_is_never_given_back_is_told_to_each_writer(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_writer, "BUSY_SECONDS", 0.05)
    with opened(path) as history:
        with write_lock(path):
            told = await _put_three(history, record)
        assert len(told) == 3
        assert "another program has locked it" in told[0].message
        await history.put(record(history.take_id()))
        assert ids_of(await latest(history, limit=10)) == [4]


@pytest.mark.parametrize("is_left", [False, True])
async def test_note_has_what_the_lock_of_another_keeps_from_the_history(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_left: bool
) -> None:
    """Clients are told of such an end: the next service must not know less.

    Nor where whoever records it is cancelled meanwhile.
    """
    monkeypatch.setattr(history_writer, "BUSY_SECONDS", 0.05)
    with closing(History.open(path, path.parent)) as history:
        runs = record(history.take_id(), State.RUNNING)
        (path.parent / "1").mkdir()
        make_note(path.parent, runs)
        await history.put(runs)
        end = evolve(runs, state=State.COMPLETED, exit_code=0, ended_at=NOW)
        with write_lock(path), trio.CancelScope() as scope:
            if is_left:
                scope.cancel()
            with pytest.raises(InternalError, match="another program has locked it"):
                await history.put(end)
        assert await history.get(runs.id) == runs
        assert read_note(path.parent, runs.id) == end


async def test_note_has_what_was_refused_together_in_its_order(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trio wakes those that wait for the writer in any order."""
    monkeypatch.setattr(history_writer, "BUSY_SECONDS", 0.05)

    async def put(record: JobRecord) -> None:
        with pytest.raises(InternalError, match="another program has locked it"):
            await history.put(record)

    with closing(History.open(path, path.parent)) as history:
        jobs = [record(history.take_id(), State.RUNNING) for _ in range(40)]
        for job in jobs:
            (path.parent / str(job.id)).mkdir()
            make_note(path.parent, job)
            await history.put(job)
        with write_lock(path):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(put, record(history.take_id()))  # the writer waits for the lock
                await trio.testing.wait_all_tasks_blocked(0.01)
                for job in jobs:
                    nursery.start_soon(put, evolve(job, detail="a notice"))
                await trio.testing.wait_all_tasks_blocked()
                for job in jobs:
                    nursery.start_soon(put, evolve(job, detail="a notice; another"))
        told = [read_note(path.parent, job.id) for job in jobs]
    assert [each.detail for each in told if each is not None] == ["a notice; another"] * 40


async def test_lock_of_another_is_not_told_as_a_full_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the room for ends has to be made anew, which needs the lock too."""
    monkeypatch.setattr(history_writer, "BUSY_SECONDS", 0.05)
    with opened(path) as history:
        with write_lock(path) as other:
            other.execute("COMMIT")
            other.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(InternalError, match="another program has locked it"):
                await history.put(record(history.take_id()), is_new=True)
        await history.put(record(history.take_id()), is_new=True)


def test_only_a_full_disk_counts_as_one(path: Path) -> None:
    with opened(path):
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        with closing(connection), pytest.raises(apsw.ReadOnlyError):
            ReservedSpace(path.with_name("other")).ensure(connection)  # whose log has no room


async def _put_together(
    history: History, path: Path, stored: list[JobRecord]
) -> dict[int, InternalError]:
    """Put records in as few transactions as can be: the errors, by id."""
    refused: dict[int, InternalError] = {}

    async def put(each: JobRecord) -> None:
        try:
            await history.put(each)
        except InternalError as error:
            refused[each.id] = error

    with write_lock(path) as other, trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for each in stored:
                nursery.start_soon(put, each)
            await until_waiting(len(stored), nursery)
            other.execute("ROLLBACK")
    return refused


class _Surprise:
    """A value that raises what nobody expects of a record."""

    def astimezone(self, _: object) -> None:
        raise RuntimeError("not a date at all")


async def test_bad_record_fails_alone_and_the_others_of_its_batch_are_stored(path: Path) -> None:
    with opened(path) as history:
        stored = [record(history.take_id()) for _ in range(6)]
        stored[2] = record(stored[2].id, owner="\ud800")
        stored[4] = evolve(stored[4], created_at=_Surprise())  # type: ignore[arg-type]
        refused = await _put_together(history, path, stored)
        assert refused.keys() == {3, 5}
        assert "not a date at all" in refused[5].message
        assert ids_of(await latest(history, limit=10)) == [6, 4, 2, 1]


async def test_record_too_large_for_the_disk_fails_alone(path: Path) -> None:
    with opened(path) as history:
        await history.put(record(history.take_id()))
        stored = [record(history.take_id()) for _ in range(3)]
        stored[1] = record(stored[1].id, spec=JobSpec(command=("x" * 100_000,) * 9))
        with file_size_limit(400_000):
            refused = await _put_together(history, path, stored)
        assert refused.keys() == {3}
        assert ids_of(await latest(history, limit=10)) == [4, 2, 1]


async def test_nobody_waits_for_the_writes_of_those_who_came_later(
    path: Path, commits: list[None]
) -> None:
    """The first put of many was once the one to write all that came while others kept coming."""
    with opened(path) as history:

        async def keep_putting() -> None:
            while True:
                await trio.lowlevel.checkpoint()
                await history.put(record(history.take_id()))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(keep_putting)
            for _ in range(5):
                before = len(commits)
                await history.put(record(history.take_id()))
                assert len(commits) - before <= 4
            nursery.cancel_scope.cancel()


async def test_nobody_waits_for_the_queue_of_another_ones_searches(path: Path) -> None:
    with opened(path) as history:
        order: list[str] = []
        leave = threading.Event()

        async def ask(who: str) -> None:
            await history._readers.search(lambda _: leave.wait(30), who)
            order.append(who)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask, "flood")
            await trio.sleep(0.05)
            nursery.start_soon(ask, "quiet")
            await trio.sleep(0.05)
            leave.set()
        assert order.index("quiet") <= 2


async def test_searches_do_not_delay_writes(path: Path) -> None:
    with opened(path) as history:
        await history.put(record(history.take_id()))
        entered, leave = threading.Event(), threading.Event()

        def search(connection: apsw.Connection) -> None:
            rows = connection.execute("SELECT id FROM jobs")
            next(rows)  # a read transaction is open
            entered.set()
            leave.wait(30)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(history._readers.search, search)
            await trio.to_thread.run_sync(entered.wait)
            with trio.fail_after(20):
                await history.put(record(history.take_id()))
                assert await history.get(JobId(2)) is not None
            leave.set()


async def test_writes_one_after_another_each_have_their_commit(
    path: Path, commits: list[None]
) -> None:
    with opened(path) as history:
        commits.clear()
        for _ in range(5):
            await history.put(record(history.take_id()))
        assert len(commits) == 5


async def test_cancelled_put_is_written_all_the_same(path: Path) -> None:
    with opened(path) as history:
        first, second = record(history.take_id()), record(history.take_id())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(history.put, first)
            nursery.start_soon(history.put, second)
            nursery.cancel_scope.cancel()
        assert ids_of(await latest(history, limit=10)) == [2, 1]


async def _put_refused(history: History, stored: JobRecord, told: list[InternalError]) -> None:
    try:
        await history.put(stored)
    except InternalError as error:
        told.append(error)


async def _put_three(history: History, make: Callable[[int], JobRecord]) -> list[InternalError]:
    told: list[InternalError] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(_put_refused, history, make(history.take_id()), told)
    return told


async def test_disk_that_refuses_is_told_to_each_writer_and_the_next_may_succeed(
    path: Path,
) -> None:
    with opened(path) as history:
        await history.put(record(history.take_id()))
        with file_size_limit(1):
            told = await _put_three(history, lambda id_: record(id_, detail="x" * 100_000))
        assert len(told) == 3
        assert "cannot record job" in told[0].message
        assert "worker.state_dir" in told[0].remedy
        assert ids_of(await latest(history, limit=10)) == [1]
        await history.put(record(history.take_id()))
        assert ids_of(await latest(history, limit=10)) == [5, 1]


async def test_record_that_cannot_be_written_leaves_no_writer_waiting(path: Path) -> None:
    with opened(path) as history:
        assert len(await _put_three(history, lambda id_: record(id_, owner="\ud800"))) == 3
        await history.put(record(history.take_id()))
        assert ids_of(await latest(history, limit=10)) == [4]


# --- files that cannot be used --------------------------------------------------------------


def refused(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        History.open(path)
    assert str(path) in caught.value.message
    return caught.value


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
async def test_older_file_keeps_its_jobs_and_becomes_one_of_today(path: Path, version: int) -> None:
    old = apsw.Connection(str(path))
    old.create_scalar_function("summary_of", lambda *_: None, 1)  # there are no records
    for script in MIGRATIONS[:version]:
        old.execute(script)
    old.pragma("user_version", version)
    kept = record(7, owner="bob")
    old.execute(
        "INSERT INTO jobs VALUES (7, ?, 'bob', '2026-01-31', ?)",
        (kept.state.value, dumps(unstructure(kept))),
    )
    old.close()
    with opened(path) as history:
        assert await history.get(kept.id) == kept
        assert history.next_id == 8
    with closing(apsw.Connection(str(path))) as today:
        assert today.pragma("user_version") == len(MIGRATIONS)


@pytest.mark.parametrize(
    "attempt",
    [
        "UPDATE audit SET outcome = 'ok'",
        "DELETE FROM audit",
        "INSERT OR REPLACE INTO audit SELECT id, at, 'x', '', '', '', '', NULL, '', '' FROM audit",
        "REPLACE INTO audit VALUES (1, '', '', '', '', '', '', NULL, '', '')",
    ],
)
def test_audit_table_takes_new_rows_and_nothing_else(path: Path, attempt: str) -> None:
    with opened(path):
        pass
    with closing(apsw.Connection(str(path))) as connection:
        row = "INSERT INTO audit VALUES (NULL, '2026', 'eve', '', '', '', 'x', NULL, 'denied', '')"
        connection.execute(row)
        with pytest.raises(apsw.ConstraintError, match="append-only"):
            connection.execute(attempt)
        assert connection.execute("SELECT name, outcome FROM audit").fetchall() == [
            ("eve", "denied")
        ]


def test_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    with opened(path):
        pass
    connection = apsw.Connection(str(path))
    newer = len(MIGRATIONS) + 1
    connection.pragma("user_version", newer)
    error = refused(path)
    assert f"version {newer}," in error.message
    assert f"version {len(MIGRATIONS)};" in str(error)
    assert connection.pragma("user_version") == newer
    connection.close()


def test_path_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    assert "move it away" in refused(tmp_path).remedy


@pytest.mark.parametrize("name", ["history.db", "history.db-wal", "history.db-shm"])
def test_file_that_may_only_be_read_is_refused_by_name(name: str) -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        path, file = Path(directory) / "history.db", Path(directory) / name
        with opened(path):
            file.chmod(0o400)
            if user == 0:  # who may write to all
                for each in (Path(directory), *Path(directory).iterdir()):
                    os.chown(each, 65534, 65534)
                os.seteuid(65534)
            try:
                told = refused(path)
            finally:
                os.seteuid(user)
        assert f"may not write to {file}" in told.message
        assert f"chmod u+rw {file}" in told.remedy


def test_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    content = b"not a database at all\n" * 100
    path.write_bytes(content)
    assert "not a database" in refused(path).message
    assert path.read_bytes() == content


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent" / "history.db")


def test_path_that_cannot_be_looked_at_is_refused_by_name(tmp_path: Path) -> None:
    assert "File name too long" in refused(tmp_path / (256 * "x") / "history.db").message


def test_history_is_kept_as_a_crash_needs_it(path: Path) -> None:
    with opened(path):
        connection = apsw.Connection(str(path))
        assert connection.pragma("journal_mode") == "wal"
        connection.close()


async def test_fault_of_the_writer_itself_is_told_and_does_not_end_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(path) as history:

        def broken(*_: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(history._writer, "_room", broken)  # has no `ensure`
            told = await _put_three(history, record)
        assert len(told) == 3
        await history.put(record(history.take_id()))


def test_highest_id_stays_kept_whichever_thread_comes_last(path: Path) -> None:
    with opened(path) as history:
        first, second = history.take_id(), history.take_id()
        history.keep_id(second)
        history.keep_id(first)
    path.unlink()
    with opened(path) as history:
        assert history.take_id() == 3
