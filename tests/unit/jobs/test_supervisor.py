"""The supervisor: who runs when, over a launcher and a history that are not there."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from jobworker.errors import NotFound, ShuttingDown
from jobworker.jobs.archive import Archive
from jobworker.jobs.execution import Execution
from jobworker.jobs.retention import KeptOutput
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.jobs.supervisor import Supervisor
from jobworker.jobs.sweep import prune
from jobworker.model.job import JobId
from jobworker.model.lifecycle import State

from .supervised import FakeHistory, FakeLink, spec, supervising


async def test_fault_of_ours_in_the_end_of_a_job_does_not_keep_the_service_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("jobworker.jobs.supervisor.REMOVE_SECONDS", 0)
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        execution = await supervisor.submit(spec("first"), "alice")
        with trio.fail_after(20):
            while history.records[JobId(1)].state is not State.RUNNING:  # noqa: ASYNC110
                await trio.sleep(0.001)
        monkeypatch.setattr(FakeHistory, "put", fail)
        link.finish(JobId(1))
        with trio.fail_after(20):
            await supervisor.shut_down(0)
        assert execution.record.state is State.COMPLETED


@pytest.mark.parametrize("seen_by", ["a look", "a reader"])
async def test_output_that_goes_between_the_end_and_the_archive_is_told_as_removed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seen_by: str,
) -> None:
    """The end is told, and the launcher takes its time to forget the job."""
    forgets = trio.Event()

    async def remove(_link: FakeLink, _job: JobId) -> None:
        await forgets.wait()

    monkeypatch.setattr(FakeLink, "remove", remove)
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        with trio.fail_after(20):
            execution = await supervisor.submit(spec("job"), "alice")
            job = execution.record.id
            link.write(job, b"text")
            link.finish(job)
            await execution.ended.wait()
            other = KeptOutput(tmp_path)  # as `worker prune` has it
            other.load()
            assert prune(other, RetentionPolicy(max_jobs=0))
            if seen_by == "a look":
                await supervisor._archive.prune()
            else:
                with pytest.raises(NotFound, match="it is not kept any more since"):
                    await supervisor.follow(job)
            forgets.set()
            await execution.forgotten.wait()
            await supervisor._archive.prune()
    assert history.records[job].output_removed_at is not None
    assert supervisor._archive._kept.missing == 0
    assert "missing" not in caplog.text
    assert list(tmp_path.iterdir()) == []


async def test_service_that_leaves_does_not_wait_for_a_client_s_long_grace(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The stop is recorded, and the next service goes on with it."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        execution = await supervisor.submit(spec("stubborn"), "alice")
        execution.request_stop(signal.SIGTERM, 1e6)
        began = trio.current_time()
        await supervisor.leave()
        assert trio.current_time() - began < 60
        pipes = link.finish(JobId(1), keep_pipes=True)
    assert not execution.ended.is_set()
    assert history.records[JobId(1)].stop_requested_at is not None
    for pipe in pipes:
        os.close(pipe)


async def test_service_that_leaves_does_not_wait_for_a_silent_launcher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        execution = await supervisor.submit(spec("left"), "alice")
        link.silent = True
        with trio.fail_after(20):
            await supervisor.leave()
        assert link.given_up
        assert not execution.ended.is_set()
    assert caplog.text.count("the launcher does not answer") == 1


@pytest.mark.parametrize("force", [False, True])
async def test_job_that_was_left_is_not_removed(tmp_path: Path, force: bool) -> None:
    """The service answers still, since another job is being stopped."""
    async with supervising(tmp_path, max_running=2) as (supervisor, link, history):
        jobs = [
            await supervisor.submit(spec(name), "alice") for name in ("left", "stopped", "waits")
        ]
        jobs[1].request_stop(signal.SIGTERM, 100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.leave)
            with trio.fail_after(20):
                await jobs[0].forgotten.wait()
                await jobs[2].forgotten.wait()
            for job in (JobId(1), JobId(3)):
                with pytest.raises(ShuttingDown, match=f"cannot reach job {job}: it is left"):
                    await supervisor.remove(job, force=force)
                assert job in history.records
                assert (tmp_path / str(job) / "index").exists()
            link.finish(JobId(2))


async def end_slowly(supervisor: Supervisor, link: FakeLink) -> Execution:
    """Have a job end, which the launcher forgets only after `link.may_remove`: a disk hangs."""
    link.may_remove = trio.Event()
    execution = await supervisor.submit(spec("job"), "alice")
    link.finish(execution.record.id)
    await link.asked_to_remove.wait()
    return execution


@pytest.mark.parametrize("owner", [None, "alice"])
async def test_output_of_an_ended_job_is_pruned_though_the_launcher_takes_long_to_forget_the_job(
    tmp_path: Path, owner: str | None
) -> None:
    """Its note stays in the mark until the launcher has forgotten the job."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        with trio.fail_after(20):
            job = (await end_slowly(supervisor, link)).record.id
            gone = await supervisor.prune(RetentionPolicy(max_jobs=0), owner)
            assert [each.job for each in gone] == [job]
            assert [each.name for each in tmp_path.iterdir()] == [f"{job}.removed"]
            link.let_remove()
            while list(tmp_path.iterdir()):  # noqa: ASYNC110
                await trio.sleep(0.01)
    assert history.records[job].output_removed_at is not None


async def test_removal_of_a_job_is_told_only_after_the_launcher_has_forgotten_the_job(
    tmp_path: Path,
) -> None:
    """Its output and its record go at once."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        with trio.fail_after(20):
            execution = await end_slowly(supervisor, link)
            job = execution.record.id
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(supervisor.remove, job, force=False))
                while job in history.records:  # noqa: ASYNC110
                    await trio.sleep(0.001)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert not execution.forgotten.is_set()  # for which the removal waits
                link.let_remove()
    assert list(tmp_path.iterdir()) == []


async def test_launcher_forgets_a_job_though_the_archive_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is recorded, and the job gives its place back."""

    async def fail(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("an unexpected fault")

    monkeypatch.setattr(Archive, "add", fail)
    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        with trio.fail_after(20):
            execution = await supervisor.submit(spec("job"), "alice")
            link.finish(execution.record.id)
            await execution.forgotten.wait()
    assert link.removed == [execution.record.id]
