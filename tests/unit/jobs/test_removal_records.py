"""The records of removals, of unsettled jobs and of others."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from attrs import evolve

from jobworker.errors import InternalError, NotFound
from jobworker.jobs.execution import Execution
from jobworker.jobs.removal_records import RemovalRecords
from jobworker.model.job import JobId, JobRecord

from ..strategies import record
from .supervised import FakeHistory

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def unsettled(job: int, history: FakeHistory) -> Execution:
    """The execution of an ended job whose record the history may not have."""

    async def put(changed: JobRecord) -> None:
        await history.put(changed)

    def note(when: datetime) -> None:
        execution.record = evolve(execution.record, output_removed_at=when)

    live_record = SimpleNamespace(put=put, note_removal_of_output=note)
    execution = SimpleNamespace(record=record(job), live_record=live_record)
    return cast("Execution", execution)


async def test_marks_of_settled_jobs_alone_may_go() -> None:
    history = FakeHistory()
    records = RemovalRecords(history)  # type: ignore[arg-type]
    await history.put(record(1))
    records.take(unsettled(2, history))
    assert await records.note([JobId(1), JobId(2)], NOW) == [1]
    assert [history.records[JobId(job)].output_removed_at for job in (1, 2)] == [NOW, NOW]
    assert (await records.latest(JobId(2))).output_removed_at == NOW
    records.forget(JobId(2))
    assert await records.note([JobId(2)], NOW) == [2]


async def test_no_mark_goes_if_the_history_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise InternalError("the disk is full")

    history = FakeHistory()
    records = RemovalRecords(history)  # type: ignore[arg-type]
    records.take(unsettled(2, history))
    monkeypatch.setattr(FakeHistory, "put", refuse)
    assert await records.note([JobId(2)], NOW) is None
    assert (await records.latest(JobId(2))).output_removed_at == NOW, "clients are told"


async def test_record_that_nobody_has_is_not_found() -> None:
    with pytest.raises(NotFound, match="no such job"):
        await RemovalRecords(FakeHistory()).latest(JobId(1))  # type: ignore[arg-type]
