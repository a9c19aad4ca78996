"""One job from its start to its end, over a launcher and a history that are not there."""

import os
import signal
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import evolve

from jobworker.errors import InternalError
from jobworker.jobs.execution import Execution
from jobworker.jobs.output.files import OutputFiles
from jobworker.model.job import (
    SERVICE_ENDED,
    JobId,
    Limits,
    OutputCut,
    OutputPolicy,
    Usage,
)
from jobworker.model.lifecycle import Reason, State

from .supervised import RULES, FakeHistory, spec, supervising


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
        await supervisor.submit(evolve(spec("short"), timeout_seconds=100.0), "alice")
        began = trio.current_time()
        ended = await supervisor.wait(JobId(2))
        assert ended.reason is Reason.TIMEOUT
        waited = link.killed[JobId(2)] - began
        # What the host's clock counts of its age counts too.
        assert 100 < waited <= 100 + RULES.stop_grace_seconds
        await trio.sleep(50_000)
        assert list(link.killed) == [2]
        link.finish(JobId(1))
        await supervisor.wait(JobId(1))


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
