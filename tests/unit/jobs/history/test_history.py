"""The history: what it was told is on the disk, and an id is handed out once."""

import os
import signal
import sys
import tempfile
from contextlib import closing
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
from jobworker.errors import InternalError
from jobworker.jobs.history import search as history_search
from jobworker.jobs.history import writer as history_writer
from jobworker.jobs.history.history import History
from jobworker.jobs.history.job_note import make_note, read_note
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.lifecycle import State
from jobworker.sandbox.protocol.requests import MAX_JOB

from ...strategies import examples, record, records
from .histories import (
    NOW,
    ids_of,
    latest,
    opened,
    path,
    refused,
    write_lock,
)

__all__ = ["path"]


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


# --- writing --------------------------------------------------------------------------------


async def test_put_returns_once_others_can_read_it(path: Path) -> None:
    with opened(path) as history:
        await history.put(record(history.take_id()))
        other = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        assert other.execute("SELECT count(*) FROM jobs").get == 1
        other.close()


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


# --- files that cannot be used --------------------------------------------------------------


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
