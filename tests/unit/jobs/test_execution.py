"""One job from its start to its end, over a launcher and a history that are not there."""

import errno
import math
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import evolve

from jobworker.errors import Busy, InternalError, OutputError
from jobworker.jobs.execution import Execution
from jobworker.jobs.history.search import Filter
from jobworker.jobs.inheritance import EndedJob, RunningJob, Takeover
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.mover import DRAIN_SECONDS
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import (
    SERVICE_ENDED,
    JobId,
    JobRecord,
    Limits,
    OutputCut,
    OutputPolicy,
    Stream,
    Usage,
)
from jobworker.model.lifecycle import Reason, State
from jobworker.sandbox.protocol.end_requests import STOP
from jobworker.sandbox.service.job_reports import EarlierEndRequest

from ..strategies import record
from .output.written_logs import append
from .supervised import RULES, FakeHistory, FakeLink, HeldStep, spec, supervising


async def test_job_has_ended_when_it_exited_however_long_the_rest_of_its_output_takes(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    def clock() -> datetime:
        return datetime(2026, 11, 24, tzinfo=UTC) + timedelta(seconds=trio.current_time())

    async with supervising(tmp_path, max_running=1, clock=clock) as (supervisor, link, history):
        execution = await supervisor.submit(spec("job"), "alice")
        await trio.sleep(60)
        exited_at = clock()
        pipes = link.finish(JobId(1), keep_pipes=True)  # somebody outside of it has them
        await supervisor.wait(JobId(1))
        assert clock() - exited_at >= timedelta(seconds=DRAIN_SECONDS)
        await execution.forgotten.wait()
    for pipe in pipes:
        os.close(pipe)
    ended_at = history.records[JobId(1)].ended_at
    assert ended_at is not None
    assert abs(ended_at - exited_at) < timedelta(seconds=1)


async def test_disk_that_hangs_below_one_owners_output_delays_no_other_owners_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    synced: list[str] = []
    noisy = [JobId(number) for number in range(1, 9)]

    def fdatasync(file: int) -> None:
        directory = Path(os.readlink(f"/proc/self/fd/{file}")).parent.name
        if int(directory) in noisy:
            assert go_on.wait(20)
        synced.append(directory)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr("jobworker.jobs.output.sync.SYNC_SECONDS", math.inf)
    async with supervising(tmp_path, max_running=20) as (supervisor, link, _):

        async def run(owner: str) -> Execution:
            execution = await supervisor.submit(spec("job"), owner)
            link.write(execution.record.id, b"text")
            link.finish(execution.record.id)
            return execution

        with trio.fail_after(10):
            loud = [await run("alice") for _ in noisy]
            await trio.testing.wait_all_tasks_blocked(0.1)
            quiet = await run("bob")
            await quiet.ended.wait()
            assert synced == [str(quiet.record.id)] * 3
            assert not any(each.ended.is_set() for each in loud)
            monkeypatch.setattr("jobworker.jobs.output.sync.SYNC_SECONDS", 0)
            late = await run("alice")
            await late.ended.wait()
            assert f"job {late.record.id}: its output is not synced after" in caplog.text
            while synced.count(str(late.record.id)) < 3:  # noqa: ASYNC110
                await trio.sleep(0.01)
            go_on.set()
            for each in loud:
                await each.ended.wait()
            assert len(synced) == 3 * (2 + len(noisy))
            monkeypatch.setattr("jobworker.jobs.output.sync.SYNC_SECONDS", math.inf)
            await (await run("alice")).ended.wait()


async def ids_of(supervisor: Supervisor, *states: State) -> list[int]:
    page = await supervisor.latest(Filter(states=frozenset(states)), 10, "alice")
    return [number for number, _ in page.records]


async def check_shown_alive(supervisor: Supervisor) -> None:
    told = await supervisor.record(JobId(1))
    assert (told.state, told.stdout_bytes, told.stderr_bytes) == (State.RUNNING, 4, 4)
    assert (told.exit_code, told.ended_at, told.usage) == (None, None, None)
    assert await ids_of(supervisor, State.RUNNING) == [1]
    assert await ids_of(supervisor, State.COMPLETED) == []
    with pytest.raises(Busy, match="it has not ended"):
        await supervisor.remove(JobId(1), force=False)


@pytest.mark.parametrize("held", ["seal", "record", "sync"])
async def test_job_is_shown_alive_with_its_sizes_until_its_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    """While its output is sealed, its end recorded, or what it has written synced."""
    ends: list[JobRecord] = []
    monkeypatch.setattr("jobworker.jobs.output.sync.SYNC_SECONDS", math.inf)
    async with (
        supervising(tmp_path, max_running=1) as (supervisor, link, history),
        trio.open_nursery() as nursery,
    ):
        # The last to be left, also where this fails: what is held is waited for.
        with HeldStep(OutputFiles.seal if held == "seal" else os.fdatasync) as step:
            execution = await supervisor.submit(spec("first"), "alice")

            async def follow() -> None:
                with await supervisor.follow(JobId(1)) as follower:
                    data = b"".join([bytes(chunk.data) async for chunk in follower])
                assert data == b"texttext"
                ends.append(await supervisor.wait(JobId(1)))

            async def stop() -> None:
                ends.append(await supervisor.stop(JobId(1), signal.SIGTERM, None))

            link.write(JobId(1), b"text")
            with trio.fail_after(20):
                while execution.spool.size < 8:  # noqa: ASYNC110
                    await trio.sleep(0.001)
            if held == "seal":
                monkeypatch.setattr(OutputFiles, "seal", step.as_method())
            else:
                monkeypatch.setattr(os, "fdatasync", step)
            if held == "record":
                history.slow = trio.Event()
                step.may.set()
            try:
                link.finish(JobId(1))
                assert await trio.to_thread.run_sync(step.begun.wait, 20)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert history.records[JobId(1)].ended == (held == "sync")
                await check_shown_alive(supervisor)
                nursery.start_soon(follow)
                nursery.start_soon(stop)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert ends == []
            finally:
                if history.slow is not None:
                    history.slow.set()
    ended = history.records[JobId(1)]
    assert ends == [ended, ended]
    assert (ended.state, ended.stdout_bytes, ended.stderr_bytes) == (State.COMPLETED, 4, 4)
    assert ended.stop_requested_at is None


async def test_job_whose_start_has_failed_is_shown_as_it_was_until_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def submit(supervisor: Supervisor) -> None:
        execution = await supervisor.submit(spec("first"), "alice")
        assert execution.start_error is not None

    async with (
        supervising(tmp_path, max_running=1) as (supervisor, link, _),
        trio.open_nursery() as nursery,
    ):
        link.stuck = True
        link.let_go.set()
        with HeldStep(OutputFiles.seal) as step:
            monkeypatch.setattr(OutputFiles, "seal", step.as_method())
            nursery.start_soon(submit, supervisor)
            assert await trio.to_thread.run_sync(step.begun.wait, 20)
            told = await supervisor.record(JobId(1))
            assert (told.state, told.reason, told.detail) == (State.INITIALIZING, None, "")
        with trio.fail_after(20):
            assert (await supervisor.wait(JobId(1))).reason is Reason.START


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


async def test_job_that_was_left_has_not_ended_whatever_is_known_of_it(tmp_path: Path) -> None:
    """Its exit is known, and a descendant holds its pipes: the next service sees to the rest."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        with trio.fail_after(20):
            execution = await supervisor.submit(spec("first"), "alice")
            while JobId(1) not in history.records:  # noqa: ASYNC110
                await trio.sleep(0.001)
            pipes = link.finish(JobId(1), keep_pipes=True)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await supervisor.leave()
    assert not execution.ended.is_set()
    assert not history.records[JobId(1)].ended
    for pipe in pipes:
        os.close(pipe)


async def test_job_whose_volume_could_not_be_looked_at_is_not_told_as_failed(
    tmp_path: Path,
) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        with trio.fail_after(20):
            await supervisor.submit(spec("first"), "alice")
            link.finish(JobId(1), unseen=("v",))
            record = await supervisor.wait(JobId(1))
    assert record.state is State.COMPLETED
    assert record.detail == (
        "whether all that it wrote to the volume v is kept is not known: the host could not look"
    )


async def test_what_was_discarded_is_recorded_where_its_index_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say, which is why it was discarded. The history has room set aside."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        execution = await supervisor.submit(spec("left"), "alice")
        monkeypatch.setattr(OutputFiles, "record_discarded", lambda _: False)
        execution.spool.count_discarded(9)
        with trio.fail_after(20):
            await supervisor.leave()
        pipes = link.finish(JobId(1), keep_pipes=True)
    assert not execution.ended.is_set()
    assert history.records[JobId(1)].discarded_bytes == 9
    for pipe in pipes:
        os.close(pipe)


async def test_cut_that_is_being_recorded_while_the_job_is_left_is_recorded(tmp_path: Path) -> None:
    """Also where the history takes its time, and then not this record."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        limits = Limits(output_bytes=1)
        execution = await supervisor.submit(evolve(spec("left"), limits=limits), "alice")
        history.slow = trio.Event()
        link.write(JobId(1), b"text")
        with trio.fail_after(20):
            while execution.record.output_cut is None:  # noqa: ASYNC110
                await trio.sleep(0.01)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.leave)
                await trio.testing.wait_all_tasks_blocked()
                history.slow.set()
        pipes = link.finish(JobId(1), keep_pipes=True)
    assert history.records[JobId(1)].output_cut is OutputCut.LIMIT
    for pipe in pipes:
        os.close(pipe)


async def test_gap_that_no_disk_takes_the_record_of_is_told_in_the_log_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise InternalError("cannot record the job: disk I/O error")

    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        execution = await supervisor.submit(spec("left"), "alice")
        monkeypatch.setattr(OutputFiles, "record_discarded", lambda _: False)
        monkeypatch.setattr(FakeHistory, "put", refuse)
        execution.spool.count_discarded(9)
        with trio.fail_after(20):
            await supervisor.leave()
        pipes = link.finish(JobId(1), keep_pipes=True)
    assert "no disk takes the record that 9 bytes of its output were discarded" in caplog.text
    for pipe in pipes:
        os.close(pipe)


# --- requests to end --------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_asks", [True, False])
async def test_stop_is_recorded_at_once_only_if_the_launcher_does_not_keep_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, keeps_asks: bool
) -> None:
    """If the launcher keeps it, the record is written once the launcher has it."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        link.keeps_asks = keeps_asks
        execution = await supervisor.submit(spec("job"), "alice")
        await trio.testing.wait_all_tasks_blocked()
        execution.live_record.changed = trio.Event()
        execution.request_stop(signal.SIGTERM, 1e6)
        assert execution.live_record.changed.is_set() is not keeps_asks
        assert execution.record.stop_requested_at is not None
        await trio.testing.wait_all_tasks_blocked()
        link.finish(JobId(1))
        ended = await supervisor.wait(JobId(1))
    assert (ended.state, ended.detail) == (State.STOPPED, "")


async def test_stop_of_an_ended_job_changes_nothing(tmp_path: Path) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        execution = await supervisor.submit(spec("job"), "alice")
        link.finish(JobId(1))
        ended = await supervisor.wait(JobId(1))
        execution.request_stop(signal.SIGTERM, None)
        assert execution.record == ended
        assert ended.stop_requested_at is None


@pytest.mark.parametrize("asked_before", [True, False])
async def test_end_by_the_service_is_told_unless_a_client_had_asked_for_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, asked_before: bool
) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, _, __):
        execution = await supervisor.submit(spec("job"), "alice")
        await trio.testing.wait_all_tasks_blocked()
        if asked_before:
            execution.request_stop(signal.SIGTERM, 1e6)
        execution.end_with_service(5)
        await execution.ended.wait()
    assert execution.record.state is State.STOPPED
    assert execution.record.detail == ("" if asked_before else SERVICE_ENDED)


async def test_job_runs_no_longer_than_it_may(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The grace period follows, and then the kill. A limit of 0 is none."""
    async with supervising(tmp_path, max_running=2) as (supervisor, link, _):
        await supervisor.submit(evolve(spec("endless"), timeout_seconds=0.0), "alice")
        began = trio.current_time()
        await supervisor.submit(evolve(spec("short"), timeout_seconds=100.0), "alice")
        ended = await supervisor.wait(JobId(2))
        assert ended.reason is Reason.TIMEOUT
        assert link.killed[JobId(2)] - began >= 100 + RULES.stop_grace_seconds
        await trio.sleep(50_000)
        assert list(link.killed) == [2]
        link.finish(JobId(1))
        await supervisor.wait(JobId(1))


# --- jobs of an earlier service ---------------------------------------------------------------


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
        cause=STOP, first_at=now - 40, kill_at=now + 600, signals=frozenset({signal.SIGTERM})
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


# --- usage ------------------------------------------------------------------------------------


async def test_usage_is_the_launcher_s_while_the_job_runs_and_the_record_s_then(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        execution = await supervisor.submit(spec("job"), "alice")
        link.used = Usage(cpu_ns=7)
        assert await execution.usage() == Usage(cpu_ns=7)
        link.used = None
        assert await execution.usage() is None, "the job may just have ended"
        link.finish(JobId(1))
        await execution.ended.wait()
        link.used = Usage(cpu_ns=7)
        assert await execution.usage() == execution.record.usage == Usage()


# --- policies and ends ------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "reason"), [("stop", Reason.OUTPUT), (None, None)])
async def test_policy_of_the_request_counts_where_its_output_is_too_long(
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    policy: OutputPolicy | None,
    reason: Reason | None,
) -> None:
    request = evolve(spec("job"), limits=Limits(output_bytes=1), at_max_output=policy)
    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        execution = await supervisor.submit(request, "alice")
        link.write(JobId(1), b"text")
        while execution.record.output_cut is None:  # noqa: ASYNC110
            await trio.sleep(0.01)
        await trio.sleep(RULES.stop_grace_seconds * 2)
        if reason is None:
            link.finish(JobId(1))
        await execution.ended.wait()
    assert execution.record.reason is reason
    assert execution.record.output_cut is OutputCut.LIMIT


@pytest.mark.parametrize("fault", [OutputError("the disk fails"), RuntimeError("a fault of ours")])
async def test_output_that_cannot_be_sealed_is_told_and_the_job_ends(
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
) -> None:
    def refuse(_: object) -> None:
        raise fault

    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        execution = await supervisor.submit(spec("job"), "alice")
        monkeypatch.setattr(OutputFiles, "seal", refuse)
        link.finish(JobId(1))
        await execution.forgotten.wait()
    assert str(fault) in execution.record.detail
    assert history.records[JobId(1)] == execution.record
    assert execution.record.state is State.COMPLETED


async def test_sync_that_fails_is_told_in_the_end_and_in_its_record(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", refuse)
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        execution = await supervisor.submit(spec("job"), "alice")
        link.write(JobId(1), b"text")
        link.finish(JobId(1))
        await execution.forgotten.wait()
    assert "its output may not be on the disk" in execution.record.detail
    assert history.records[JobId(1)] == execution.record


async def test_launcher_keeps_a_job_until_the_history_has_its_end(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = True
    put = FakeHistory.put

    async def put_or_refuse(history: FakeHistory, told: JobRecord, *, is_new: bool = False) -> None:
        if refuses and told.ended:
            raise InternalError("cannot record the job: the disk is full")
        await put(history, told, is_new=is_new)

    monkeypatch.setattr(FakeHistory, "put", put_or_refuse)
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        execution = await supervisor.submit(spec("job"), "alice")
        link.finish(JobId(1))
        ended = await supervisor.wait(JobId(1))
        await trio.sleep(10)
        assert (ended.state, link.removed) == (State.COMPLETED, [])
        refuses = False
        await execution.forgotten.wait()
    assert (link.removed, history.records[JobId(1)]) == ([1], ended)


async def test_fault_of_ours_ends_the_job_with_its_incident(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        execution = await supervisor.submit(spec("job"), "alice")
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(Execution, "_finish", fail)
        link.finish(JobId(1))
        ended = await supervisor.wait(JobId(1))
        await execution.forgotten.wait()
    assert (ended.state, ended.reason) == (State.FAILED, Reason.LOST)
    assert "an internal fault ended the job (incident " in ended.detail
    assert (link.removed[:1], history.records[JobId(1)]) == ([1], ended)


async def test_job_that_is_being_stopped_is_left_only_anyway(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        execution = await supervisor.submit(spec("job"), "alice")
        execution.request_stop(signal.SIGTERM, 1e6)
        await trio.testing.wait_all_tasks_blocked()
        execution.leave()
        await trio.testing.wait_all_tasks_blocked()
        assert not execution.over.is_set()
        execution.leave(anyway=True)
        await execution.over.wait()
        pipes = link.finish(JobId(1), keep_pipes=True)
    assert not execution.ended.is_set()
    assert history.records[JobId(1)].stop_requested_at is not None
    for pipe in pipes:
        os.close(pipe)
