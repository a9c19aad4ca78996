"""One job from its start to its end, over a launcher and a history that are not there."""

import math
import os
import signal
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import evolve

from jobworker.errors import Busy, InternalError
from jobworker.jobs.execution import Execution
from jobworker.jobs.history.search import Filter
from jobworker.jobs.inheritance import EndedJob, Takeover
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.mover import DRAIN_SECONDS
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import JobId, JobRecord, Limits, OutputCut
from jobworker.model.lifecycle import Reason, State

from ..strategies import record
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
