"""The statements of the history: what they write, and what they find."""

from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import apsw
import pytest
import trio
import trio.lowlevel
import trio.testing
from attrs import evolve
from hypothesis import given

from jobworker.jobs.history import queries
from jobworker.jobs.history.job_note import make_note, read_note
from jobworker.jobs.history.schema import migrate
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.lifecycle import LIVE, State
from jobworker.model.summary import without_bulk

from ...strategies import examples, record, records
from .histories import NOW, ids_of, latest, opened, path

__all__ = ["path"]


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


# --- statements -------------------------------------------------------------------------------

LONG = ("true", "x" * 3000)
"""A command that a summary cuts, and that is short enough to stay in memory."""


@pytest.fixture
def connection(path: Path) -> Iterator[apsw.Connection]:
    with closing(apsw.Connection(str(path))) as connection:
        connection.pragma("synchronous", "off")
        migrate(connection, path)
        yield connection


def put(connection: apsw.Connection, stored: JobRecord) -> JobRecord:
    queries.put(stored, None, connection)
    return stored


def rows_of(connection: apsw.Connection, table: str) -> list[tuple[object, ...]]:
    return [tuple(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2")]


def test_labels_and_name_are_written_once(connection: apsw.Connection) -> None:
    spec = JobSpec(command=("true",), name="nightly", labels={"a": "1", "b": "2"})
    for state in (State.PENDING, State.RUNNING, State.COMPLETED):
        put(connection, record(7, state, spec=spec))
    assert rows_of(connection, "labels") == [("", "nightly", 7), ("a", "1", 7), ("b", "2", 7)]
    put(connection, record(8))
    assert len(rows_of(connection, "labels")) == 3, "no name is no label"
    connection.execute("DELETE FROM jobs")  # an older copy was put back in part
    put(connection, record(7, spec=spec))
    assert len(rows_of(connection, "labels")) == 3


def test_long_request_is_kept_whole_and_not_replaced_by_its_summary(
    connection: apsw.Connection,
) -> None:
    whole = put(connection, record(7, State.PENDING, spec=JobSpec(command=LONG)))
    assert queries.select_whole(JobId(7), connection) == whole
    summary = queries.select_summary(JobId(7), connection)
    assert summary is not None
    assert (summary.abridged, len(summary.spec.command[1]) < 3000) == (("command",), True)
    put(connection, evolve(summary, state=State.RUNNING))
    connection.execute("DELETE FROM jobs")
    put(connection, summary)
    found = queries.select_whole(JobId(7), connection)
    assert found is not None
    assert found.spec.command == LONG
    put(connection, record(8))
    assert queries.select_spec(JobId(8), connection) is None
    assert queries.select_spec(JobId(9), connection) is None
    assert queries.select_whole(JobId(9), connection) is None


def test_removed_job_leaves_nothing_and_takes_nothing_of_others(
    connection: apsw.Connection,
) -> None:
    spec = JobSpec(command=LONG, name="n", labels={"a": "1"})
    for job in (7, 8):
        put(connection, record(job, spec=spec))
    queries.delete(JobId(7), connection)
    queries.delete(JobId(7), connection)
    assert [row[2] for row in rows_of(connection, "labels")] == [8, 8]
    assert [row[0] for row in rows_of(connection, "specs")] == [8]
    assert queries.select_known([JobId(7), JobId(8), JobId(9)], connection) == {8}


def test_job_that_is_removed_without_its_output_is_remembered(
    connection: apsw.Connection,
) -> None:
    put(connection, record(7))
    put(connection, record(8, output_removed_at=NOW))
    for job in (7, 7, 8, 9):
        queries.mark_output_missing(JobId(job), connection)
    assert queries.select_removed([JobId(job) for job in (6, 7, 8, 9)], connection) == {7}
    queries.delete(JobId(7), connection)
    assert queries.select_removed([JobId(7)], connection) == {7}
    assert queries.select_removed([JobId(8)], connection) == frozenset()


def test_ended_jobs_with_output_are_told_with_their_owners(connection: apsw.Connection) -> None:
    for job, state in enumerate(State, 1):
        put(connection, record(job, state, owner="alice" if job % 2 else "bob"))
    put(connection, record(20, output_removed_at=NOW))
    ended = {job for job, state in enumerate(State, 1) if state not in LIVE}
    found = queries.select_with_output(connection)
    assert found == {job: "alice" if job % 2 else "bob" for job in ended}


def test_first_time_of_a_removal_stays(connection: apsw.Connection) -> None:
    put(connection, record(7))
    jobs = [JobId(7), JobId(9)]
    queries.mark_output_removed(jobs, NOW, connection)
    queries.mark_output_removed(jobs, NOW + timedelta(days=1), connection)
    found = queries.select_summary(JobId(7), connection)
    assert found == record(7, output_removed_at=NOW)
    assert queries.select_summary(JobId(9), connection) is None


@pytest.mark.parametrize("is_read", [True, False])
def test_request_is_read_at_the_start_up_to_its_bound(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    stored = put(connection, record(7, State.PENDING, spec=JobSpec(command=LONG)))
    size = len(queries.select_spec(JobId(7), connection) or "")
    monkeypatch.setattr(queries, "MAX_READ_BYTES", size if is_read else size - 1)
    (found,) = queries.select_unfinished(connection)
    assert found.abridged == (() if is_read else ("command",))
    assert (found == stored) is is_read


def test_many_unfinished_jobs_are_told_in_the_log(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(queries, "MANY_UNFINISHED", 2)
    put(connection, record(1, State.RUNNING))
    put(connection, record(2))
    assert len(queries.select_unfinished(connection)) == 1
    assert caplog.text == ""
    put(connection, record(3, State.PENDING))
    assert len(queries.select_unfinished(connection)) == 2
    assert "reading 2 jobs of an earlier service" in caplog.text


def test_note_gets_what_the_history_gets(connection: apsw.Connection, tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    make_note(tmp_path, record(7, State.RUNNING))
    queries.put(record(7), tmp_path, connection)
    assert read_note(tmp_path, JobId(7)) == record(7)
