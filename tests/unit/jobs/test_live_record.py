"""The record of a live job, and what of it reaches the history."""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import Factory, define, evolve

from jobworker.errors import InternalError
from jobworker.jobs.inheritance import RunningJob, Takeover
from jobworker.jobs.live_record import RECORD_AGAIN_SECONDS, LiveRecord
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import (
    SERVICE_ENDED,
    JobId,
    JobRecord,
    JobSpec,
    OutputCut,
    Usage,
)
from jobworker.model.lifecycle import Event, State
from jobworker.sandbox.service.job_ends import Started
from jobworker.sandbox.service.job_reports import JobExit

from ..strategies import record
from .supervised import spec, supervising

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@define(eq=False)
class History:
    """Takes records, or refuses them; gives back a whole request."""

    stored: list[JobRecord] = Factory(list)
    notes: list[JobRecord] = Factory(list)
    removed: list[JobId] = Factory(list)
    refuses: bool = False
    whole: JobSpec | None = None

    async def put(self, record: JobRecord) -> None:
        await trio.lowlevel.checkpoint()
        if self.refuses:
            raise InternalError("the disk is full")
        self.stored.append(record)

    async def keep_note(self, record: JobRecord) -> None:
        await trio.lowlevel.checkpoint()
        self.notes.append(record)

    async def remove(self, job: JobId) -> None:
        await trio.lowlevel.checkpoint()
        if self.refuses:
            raise InternalError("the disk is full")
        self.removed.append(job)

    async def request(self, _job: JobId) -> JobSpec | None:
        await trio.lowlevel.checkpoint()
        return self.whole


@pytest.fixture
def history() -> History:
    return History()


@pytest.fixture
def live(tmp_path: Path, history: History) -> Iterator[LiveRecord]:
    live = LiveRecord(
        record=record(1, State.RUNNING, started_at=NOON),
        spool=Spool.create(tmp_path / "1"),
        history=history,  # type: ignore[arg-type]
        clock=lambda: NOON + timedelta(seconds=100),
    )
    yield live
    live.spool.close()


async def test_no_write_comes_before_the_first_record(live: LiveRecord, history: History) -> None:
    live.admission = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(live.store)
        await trio.testing.wait_all_tasks_blocked()
        assert history.stored == []
        live.admission.set()
    assert history.stored == [live.record]


async def test_job_that_was_refused_is_not_written(live: LiveRecord, history: History) -> None:
    live.is_withdrawn = True
    assert await live.store()
    await live.withdraw()
    assert (history.stored, history.removed) == ([], [])


async def test_removed_record_does_not_come_back(live: LiveRecord, history: History) -> None:
    await live.store()
    await live.withdraw()
    await live.withdraw()
    assert await live.store()
    assert (len(history.stored), history.removed) == (1, [JobId(1)])


async def test_record_that_could_not_be_removed_is_still_written(
    live: LiveRecord, history: History
) -> None:
    history.refuses = True
    with pytest.raises(InternalError):
        await live.withdraw()
    assert not live.is_withdrawn
    assert not await live.store(), "the refusal is told"


async def test_change_is_written_once_the_disk_takes_it(
    live: LiveRecord, history: History, autojump_clock: trio.testing.MockClock
) -> None:
    history.refuses = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(live.serve)
        live.note("a word")
        await trio.sleep(RECORD_AGAIN_SECONDS * 3.5)
        assert history.stored == []
        history.refuses = False
        await trio.sleep(RECORD_AGAIN_SECONDS)
        assert [each.detail for each in history.stored] == ["a word"]
        live.note_cut(OutputCut.LIMIT, "its output is cut")
        await trio.testing.wait_all_tasks_blocked()
        assert history.stored[1].output_cut is OutputCut.LIMIT
        await trio.sleep(RECORD_AGAIN_SECONDS * 5)
        assert len(history.stored) == 2, "one write for each change"
        nursery.cancel_scope.cancel()


async def test_change_whose_write_is_cancelled_is_still_to_be_written(live: LiveRecord) -> None:
    live.admission = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(live.serve)
        live.note("a word")
        await trio.testing.wait_all_tasks_blocked()
        assert not live.changed.is_set(), "it waits for the admission"
        nursery.cancel_scope.cancel()
    assert live.changed.is_set()


def test_first_stop_counts(live: LiveRecord) -> None:
    live.stop_was_told()
    assert not live.changed.is_set(), "there is no stop"
    live.note_stop(seconds_ago=40)
    live.note_stop()
    assert live.record.stop_requested_at == NOON + timedelta(seconds=60)
    live.stop_was_told()
    assert live.changed.is_set()


async def test_note_has_the_sizes_of_that_moment(live: LiveRecord, history: History) -> None:
    live.record = evolve(live.record, output_cut=OutputCut.LIMIT)
    await live.keep_note()
    assert history.notes == [live.now()]


async def test_whole_request_comes_from_the_history_if_the_record_is_abridged(
    live: LiveRecord, history: History
) -> None:
    assert await live.whole_spec() is live.record.spec
    live.record = evolve(live.record, abridged=("command",))
    with pytest.raises(InternalError, match="the history has lost its request"):
        await live.whole_spec()
    history.whole = JobSpec(command=("true", "x" * 10))
    assert await live.whole_spec() is history.whole


async def test_end_by_the_service_is_told(live: LiveRecord) -> None:
    assert live.advanced(Event.STOP).detail == ""
    live.ends_with_service = True
    assert SERVICE_ENDED in live.advanced(Event.STOP).detail
    assert live.advanced(Event.SUCCEED).detail == ""


async def test_job_has_ended_when_it_exited_by_the_clock_that_is_never_set(
    live: LiveRecord, autojump_clock: trio.testing.MockClock
) -> None:
    await trio.sleep(500)
    live.note_start(age_seconds=90)
    live.note_exit(seconds_ago=20)
    await trio.sleep(10)  # its output is drained
    assert live.advanced(Event.SUCCEED).ended_at == NOON + timedelta(seconds=100 - 30)
    # The time of day was set back meanwhile: the job has run 70 seconds all the same.
    live.record = evolve(live.record, started_at=NOON + timedelta(seconds=50))
    assert live.advanced(Event.SUCCEED).ended_at == NOON + timedelta(seconds=50 + 70)


@pytest.mark.parametrize("seconds_ago", [0.0, 2.0])
async def test_job_ends_after_it_ran_though_the_clock_of_the_next_service_is_behind(
    tmp_path: Path, seconds_ago: float
) -> None:
    now = datetime(2026, 11, 24, tzinfo=UTC)
    record = JobRecord(
        id=JobId(1),
        spec=spec("taken over"),
        owner="alice",
        state=State.RUNNING,
        created_at=now,
        started_at=now + timedelta(minutes=1),
    )
    (out, out_write), (err, err_write) = (os.pipe2(os.O_NONBLOCK) for _ in range(2))
    os.close(out_write)
    os.close(err_write)
    send, exits = trio.open_memory_channel[JobExit](1)
    told_at = time.monotonic()
    ended_at = told_at - seconds_ago
    send.send_nowait(JobExit(code=0, signal=None, usage=Usage(), ended_at=ended_at))
    send.close()
    started = Started(pid=1, stdout=out, stderr=err, since=told_at - 8)
    taken = Takeover(running=[RunningJob(record, Spool.create(tmp_path / "1"), started, exits)])
    behind = now - timedelta(days=1)
    async with supervising(tmp_path, max_running=1, clock=lambda: behind, inheritance=taken) as (
        supervisor,
        _,
        history,
    ):
        with trio.fail_after(20):
            await supervisor.wait(JobId(1))
    ended = history.records[JobId(1)]
    assert ended.started_at is not None
    assert ended.ended_at is not None
    ran = (ended.ended_at - ended.started_at).total_seconds()
    assert abs(ran - (8 - seconds_ago)) < 0.1, "as long as the launcher says"


async def test_removal_of_output_keeps_its_first_time(live: LiveRecord) -> None:
    """The history may refuse the record, and then each look finds the removal again."""
    live.note_removal_of_output(NOON)
    live.note_removal_of_output(NOON + timedelta(seconds=1))
    assert live.record.output_removed_at == NOON
