"""The statements of the history: what they write, and what they find."""

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
