"""A job whose client was told that there is none: it is none, whatever becomes of the service."""

import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing

from jobworker.errors import (
    InternalError,
)
from jobworker.jobs.leftovers import refused_of
from jobworker.model.job import JobId, JobSpec

from .failing_disks import Disks, HistoryFault
from .kept_launcher import KeptLauncher, Manner
from .played_program import Behaviour, Start
from .played_service import PlayedService
from .supervised import spec, supervising
from .told import Told

SPEC = JobSpec(command=("request",), name="request", timeout_seconds=0)


@asynccontextmanager
async def refusing(
    directory: Path, disks: Disks, fault: HistoryFault, *starts: Start
) -> AsyncIterator[tuple[PlayedService, KeptLauncher, trio.Nursery]]:
    """A service whose history takes nothing new."""
    (directory / "spool").mkdir(parents=True)
    launcher = KeptLauncher({"request": Behaviour(starts=list(starts), on_signal="goes on")}, [])
    async with trio.open_nursery() as nursery:
        service = await PlayedService.start(nursery, directory, launcher, Told())
        disks.history = fault
        yield service, launcher, nursery
        nursery.cancel_scope.cancel()


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> Disks:
    disks = Disks()
    disks.install(monkeypatch)
    return disks


@pytest.mark.parametrize("fault", ["locked", "full", "full for what is new"])
@pytest.mark.parametrize("manner", ["answers", "refuses"])
@pytest.mark.parametrize("ends", [False, True])
async def test_job_that_was_refused_is_none_for_the_next_service_though_this_one_is_killed(
    tmp_path: Path,
    disks: Disks,
    autojump_clock: trio.testing.MockClock,
    fault: HistoryFault,
    manner: Manner,
    ends: bool,
) -> None:
    """At once, or when it has ended and its output is gone: the launcher may still have the job."""
    async with refusing(tmp_path / "killed", disks, "slow") as (service, launcher, nursery):
        answered = trio.Event()

        async def submit() -> None:
            with pytest.raises(InternalError):
                await service.supervisor.submit(SPEC, "alice")
            answered.set()

        nursery.start_soon(submit)
        while not launcher.alive():
            await trio.lowlevel.checkpoint()
        launcher.behave(manner)
        disks.history = fault
        await answered.wait()
        for program in launcher.alive() if ends else ():
            launcher.end(program, 0, None)
        await trio.testing.wait_all_tasks_blocked()
        left = shutil.copytree(tmp_path / "killed", tmp_path / "left")
        await service.die()
        disks.mend()
        following = await PlayedService.start(nursery, left, launcher, Told())
        assert await following.list_jobs() == {}
        assert launcher.programs == {}
        assert os.listdir(left / "spool") == []


async def test_job_that_was_refused_while_it_started_is_none_for_the_next_service(
    tmp_path: Path, disks: Disks, autojump_clock: trio.testing.MockClock
) -> None:
    """Its start may have had success, which the service that leaves does not hear of."""
    async with refusing(tmp_path, disks, "locked", "hangs") as (service, launcher, nursery):
        with pytest.raises(InternalError):
            await service.supervisor.submit(SPEC, "alice")
        launcher.behave("silent")
        await service.leave()
        launcher._execute(JobId(1), "request")
        following = await PlayedService.start(nursery, tmp_path, launcher, Told())
        assert await following.list_jobs() == {}
        assert launcher.programs == {}


async def test_later_record_of_a_job_does_not_come_before_that_of_its_admission(
    tmp_path: Path, disks: Disks, autojump_clock: trio.testing.MockClock
) -> None:
    """It would have the room that is set aside for ends."""
    async with refusing(tmp_path, disks, "slow") as (service, launcher, nursery):

        async def submit() -> None:
            with pytest.raises(InternalError):
                await service.supervisor.submit(SPEC, "alice")

        nursery.start_soon(submit)
        while not launcher.alive():
            await trio.lowlevel.checkpoint()
        execution = service.supervisor.live(JobId(1))
        assert execution is not None
        execution.request_stop(signal.SIGTERM, None)
        disks.history = "full for what is new"
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(60):
            await execution.over.wait()
        assert await service.supervisor._history.get(JobId(1)) is None


async def test_note_of_a_refusal_is_found_beside_the_output_and_in_the_mark_of_its_removal(
    tmp_path: Path, disks: Disks, autojump_clock: trio.testing.MockClock
) -> None:
    async with refusing(tmp_path, disks, "locked") as (service, _, _nursery):
        with pytest.raises(InternalError):
            await service.supervisor.submit(SPEC, "alice")
        spools = tmp_path / "spool"
        assert refused_of(spools, [JobId(1), JobId(2)]) == {1}
        (spools / "1").rename(spools / "1.removed")
        assert refused_of(spools, [JobId(1), JobId(2)]) == {1}


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize(("max_running", "exits"), [(0, False), (1, False), (1, True)])
async def test_job_that_is_refused_while_the_service_ends_is_taken_back(
    tmp_path: Path, leaves: bool, max_running: int, exits: bool
) -> None:
    """It waits, runs already, or has exited; its client is told that there is no such job."""
    async with supervising(tmp_path, max_running=max_running) as (supervisor, link, history):
        history.held, history.slow = trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:

            async def submit() -> None:
                with pytest.raises(InternalError, match="locked the history"):
                    await supervisor.submit(spec("refused"), "alice")

            nursery.start_soon(submit)
            while supervisor.live(JobId(1)) is None:  # noqa: ASYNC110
                await trio.sleep(0.001)
            refused = supervisor.live(JobId(1))
            assert refused is not None
            if max_running:
                while not link.spawned:  # noqa: ASYNC110
                    await trio.sleep(0.001)
            if exits:
                link.finish(JobId(1))
            nursery.start_soon(supervisor.leave if leaves else lambda: supervisor.shut_down(5))
            await trio.testing.wait_all_tasks_blocked(0.05)
            history.held.set()
            try:
                with trio.fail_after(20):
                    while max_running and not link.removed:  # noqa: ASYNC110
                        await trio.sleep(0.001)
            finally:  # not before the launcher was told
                history.slow.set()
        with trio.fail_after(20):
            await refused.forgotten.wait()
    assert set(link.removed) == {JobId(1)} if max_running else not link.removed
    assert history.records == {}
    assert list(tmp_path.iterdir()) == []


async def test_job_that_was_refused_is_removed_though_it_cannot_be_killed_in_time(
    tmp_path: Path,
) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        history.held = trio.Event()
        async with trio.open_nursery() as nursery:

            async def submit() -> None:
                with pytest.raises(InternalError, match="locked the history"):
                    await supervisor.submit(spec("stuck"), "alice")

            nursery.start_soon(submit)
            while not link.spawned:  # noqa: ASYNC110
                await trio.sleep(0.001)
            link.silent = True
            history.held.set()
        execution = supervisor.live(JobId(1))
        assert execution is not None
        await supervisor.leave()
        with trio.fail_after(20):
            await execution.forgotten.wait()
        pipes = link.finish(JobId(1), keep_pipes=True)
    assert link.removed == [JobId(1)]
    assert history.records == {}
    assert list(tmp_path.iterdir()) == []
    for pipe in pipes:
        os.close(pipe)
