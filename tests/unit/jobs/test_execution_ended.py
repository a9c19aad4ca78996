"""The steps of a job's end: sealed, recorded, told, and only then forgotten by the launcher."""

import errno
import math
import os
import signal
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing

from jobworker.errors import Busy, InternalError, OutputError
from jobworker.jobs.execution import Execution
from jobworker.jobs.history.search import Filter
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.mover import DRAIN_SECONDS
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import (
    JobId,
    JobRecord,
)
from jobworker.model.lifecycle import Reason, State

from .supervised import FakeHistory, HeldStep, spec, supervising


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
    monkeypatch.setattr("jobworker.jobs.output.sync.SYNC_SECONDS", math.inf)
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


async def test_stop_of_a_job_whose_start_has_failed_comes_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is being recorded: it was not stopped."""
    async with (
        supervising(tmp_path, max_running=1) as (supervisor, link, _),
        trio.open_nursery() as nursery,
    ):
        link.stuck = True
        link.let_go.set()
        with HeldStep(OutputFiles.seal) as step:
            monkeypatch.setattr(OutputFiles, "seal", step.as_method())
            nursery.start_soon(supervisor.submit, spec("first"), "alice")
            assert await trio.to_thread.run_sync(step.begun.wait, 20)
            execution = supervisor.live(JobId(1))
            assert execution is not None
            execution.request_stop(signal.SIGTERM, None)
            assert execution.record.stop_requested_at is None
        with trio.fail_after(20):
            assert (await supervisor.wait(JobId(1))).reason is Reason.START
