"""Jobs that an earlier service has started: their executions go on where it stopped."""

import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import evolve

from jobworker.jobs.execution import Execution
from jobworker.jobs.inheritance import EndedJob, RunningJob, Takeover
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import (
    JobId,
    JobRecord,
    OutputCut,
    OutputPolicy,
    Stream,
)
from jobworker.model.lifecycle import Reason, State
from jobworker.sandbox.protocol.end_requests import STOP
from jobworker.sandbox.service.job_reports import EarlierEndRequest

from ..strategies import record
from .output.written_logs import append
from .supervised import RULES, FakeHistory, FakeLink, spec, supervising


@asynccontextmanager
async def taken_over(
    directory: Path,
    told: JobRecord,
    *,
    asked: EarlierEndRequest | None = None,
    since: float = 0,
    keeps_asks: bool = True,
    spool: Spool | None = None,
) -> AsyncIterator[tuple[Supervisor, FakeLink, FakeHistory, Execution]]:
    """Go on with job 1, which the launcher has started for an earlier service."""
    link = FakeLink(keeps_asks=keeps_asks)
    started, exits = link.begin(JobId(1), asked=asked, seconds_ago=since)
    spool = spool or Spool.create(directory / "1")
    taken = Takeover(running=[RunningJob(told, spool, started, exits)])
    async with supervising(directory, max_running=1, inheritance=taken, link=link) as (
        supervisor,
        _,
        history,
    ):
        execution = supervisor.live(JobId(1))
        assert execution is not None
        yield supervisor, link, history, execution


RUNS = record(1, State.RUNNING, started_at=datetime(2026, 2, 1, tzinfo=UTC))


async def test_end_that_a_note_has_told_is_whole_though_its_output_is_gone(tmp_path: Path) -> None:
    """From the first moment on, and while the history still refuses it."""
    end = record(1, stdout_bytes=4, stderr_bytes=5)
    taken = Takeover(ended=[EndedJob(end, Spool.gone())])
    async with supervising(tmp_path, max_running=1, inheritance=taken) as (supervisor, _, history):
        assert await supervisor.wait(JobId(1)) == end  # before anything else has run
        history.slow = trio.Event()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert await supervisor.record(JobId(1)) == end
        assert await supervisor.stop(JobId(1), signal.SIGTERM, None) == end
        history.slow.set()


@pytest.mark.parametrize(("seconds_ago", "left"), [(90, 10), (1000, 0)])
async def test_time_before_the_takeover_counts_to_the_time_limit(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, seconds_ago: float, left: float
) -> None:
    told = evolve(RUNS, spec=evolve(spec("job"), timeout_seconds=100.0))
    began = trio.current_time()
    async with taken_over(tmp_path, told, since=seconds_ago) as (supervisor, link, *_):
        assert (await supervisor.wait(JobId(1))).reason is Reason.TIMEOUT
    waited = link.killed[JobId(1)] - began - RULES.stop_grace_seconds
    assert left - 10 < waited <= left + 0.01, "the host's clock has gone on meanwhile"


async def test_discarded_bytes_of_the_record_count_on(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with taken_over(tmp_path, evolve(RUNS, discarded_bytes=9)) as (supervisor, link, *_):
        assert (await supervisor.record(JobId(1))).discarded_bytes == 9
        link.finish(JobId(1))
        assert (await supervisor.wait(JobId(1))).discarded_bytes == 9


async def test_stop_that_only_the_launcher_knows_of_is_recorded_with_its_time(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    now = time.monotonic()
    asked = EarlierEndRequest(
        cause=STOP, first_at=now - 40, kill_at=now + 1e6, signals=frozenset({signal.SIGTERM})
    )
    async with taken_over(tmp_path, RUNS, asked=asked) as (_, link, history, execution):
        await trio.testing.wait_all_tasks_blocked()
        recorded = history.records[JobId(1)].stop_requested_at
        assert recorded is not None
        age = (datetime.now(UTC) - recorded).total_seconds()
        assert 39 < age < 100
        link.finish(JobId(1))
        await execution.ended.wait()
    assert execution.record.state is State.STOPPED


@pytest.mark.parametrize("policy", ["stop", "discard-output"])
@pytest.mark.parametrize("keeps_asks", [True, False])
async def test_cut_of_an_earlier_service_ends_the_job_where_its_policy_says_so(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, policy: OutputPolicy, keeps_asks: bool
) -> None:
    told = evolve(RUNS, output_cut=OutputCut.LIMIT, spec=evolve(spec("job"), at_max_output=policy))
    async with taken_over(tmp_path, told, keeps_asks=keeps_asks) as (_, link, __, execution):
        await trio.sleep(RULES.stop_grace_seconds * 2)
        assert list(link.killed) == ([1] if policy == "stop" else [])
        if policy != "stop":
            link.finish(JobId(1))
        await execution.ended.wait()
    assert execution.record.reason is (Reason.OUTPUT if policy == "stop" else None)


@pytest.mark.parametrize("keeps_asks", [True, False])
async def test_stop_of_the_record_goes_on_though_the_launcher_does_not_know_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, keeps_asks: bool
) -> None:
    """A launcher that keeps no requests may have carried it out: the exit is that of a stop."""
    told = evolve(RUNS, stop_requested_at=RUNS.started_at)
    async with taken_over(tmp_path, told, keeps_asks=keeps_asks) as (_, link, __, execution):
        link.finish(JobId(1))
        await execution.ended.wait()
    assert execution.record.state is (State.COMPLETED if keeps_asks else State.STOPPED)


async def test_output_that_was_sealed_is_not_written_on(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    spool = Spool.create(tmp_path / "1")
    append(spool, Stream.STDOUT, b"text")
    await spool.seal()
    async with taken_over(tmp_path, RUNS, spool=spool) as (_, link, __, execution):
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BrokenPipeError):
            link.write(JobId(1), b"more")
        link.finish(JobId(1))
        await execution.ended.wait()
    assert execution.record.stdout_bytes == 4


async def test_notice_of_the_launcher_stands_in_the_record_once(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    told = evolve(RUNS, detail="its private network ended: x")
    async with taken_over(tmp_path, told) as (_, link, history, execution):
        await trio.testing.wait_all_tasks_blocked()
        for words in ("its private network ended: x", "a word", "a word"):
            link.notify(JobId(1), words)
        await trio.testing.wait_all_tasks_blocked()
        assert history.records[JobId(1)].detail.count("a word") == 1
        link.notify(JobId(1), "the last word")
        link.finish(JobId(1))
        await execution.ended.wait()
    detail = execution.record.detail
    assert [detail.count(words) for words in ("network ended", "a word", "the last word")] == [
        1
    ] * 3
