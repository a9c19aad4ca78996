"""What the state machine of jobs moves in: one directory, one launcher at a time, many services.

History and output are real files, the pipes are the kernel's; the launcher is played
(`kept_launcher`), and the disks refuse when a rule says so (`failing_disks`). Each example is one
Trio run on a mock clock, over as many services as its rules start.
"""

import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import frozen
from hypothesis.stateful import RuleBasedStateMachine

from jobworker.errors import JobworkerError
from jobworker.model.job import JobId

from .failing_disks import Disks, HistoryFault, OutputFault
from .kept_launcher import KeptLauncher, Manner
from .output.written_logs import open_fds
from .played_link import ServiceLink
from .played_program import Behaviour, Program
from .played_service import PlayedService, now
from .stepped_trio import SteppedTrio
from .told import Told

IN_MEMORY = Path("/dev/shm")


@frozen
class Kill:
    """SIGKILL for the service, amid what comes next."""

    turns: int | None
    """After so many turns of the event loop; None is when nothing moves any more."""
    keeps_jobs: bool
    """Whether the launcher goes on."""


@frozen
class Mishap:
    """What is amiss when something is done; the faults stay until they are mended."""

    history: HistoryFault = ""
    output: OutputFault = ""
    launcher: Manner = "answers"
    kill: Kill | None = None


def has_service(world: "LifecycleWorld") -> bool:
    return world.service is not None and not world.service.leaving


class LifecycleWorld(RuleBasedStateMachine):
    """Without rules: how each of them is carried out."""

    service: PlayedService | None = None
    kill: Kill | None = None

    def begin(self) -> None:
        self.open_before = open_fds()
        self.directories: list[Path] = []
        self.directory = self.make_directory()
        (self.directory / "spool").mkdir()
        self.patch, self.disks, self.told = pytest.MonkeyPatch(), Disks(), Told()
        self.disks.install(self.patch)
        logging.disable(logging.CRITICAL)  # thousands of lines, of faults that are meant
        self.behaviours: dict[str, Behaviour] = {}
        self.executed: list[Program] = []
        self.launcher = KeptLauncher(self.behaviours, self.executed)
        self.run = SteppedTrio()
        self.start_service()

    def make_directory(self) -> Path:
        directory = Path(tempfile.mkdtemp(dir=IN_MEMORY if IN_MEMORY.is_dir() else None))
        self.directories.append(directory)
        return directory

    def copy_of_disk(self) -> Path:
        """All files as they are at this moment."""
        with self.disks.aside():
            copy = self.make_directory()
            shutil.copytree(self.directory, copy, symlinks=True, dirs_exist_ok=True)
        return copy

    def close(self) -> None:
        async def let_go() -> None:
            self.launcher.die()  # after a failed rule somebody may wait for it, shielded

        with suppress(Exception):  # the fault of a task that nobody has heard of
            self.run.do(let_go)
        self.run.close()
        self.patch.undo()
        logging.disable(logging.NOTSET)
        for directory in self.directories:
            shutil.rmtree(directory)

    # --- steps ------------------------------------------------------------------------------

    def do(self, step: Callable[[], Awaitable[object]]) -> None:
        """Run a step and what follows from it at once, or is not cut short by a kill."""
        kill, self.kill = self.kill, None

        async def settled() -> None:
            await step()
            if kill is None or self.service is None:
                await trio.testing.wait_all_tasks_blocked()
                return
            await self.let_pass(kill.turns)
            await self.kill_service(self.service)

        self.run.do(settled)
        if kill is not None and self.service is None:
            self.start_service(keeps_jobs=kill.keeps_jobs)

    async def let_pass(self, turns: int | None) -> None:
        if turns is None:
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(turns or 0):
            await trio.lowlevel.checkpoint()

    def befall(self, mishap: Mishap | None) -> None:
        """Have something be amiss from now on."""
        if mishap is not None:
            self.disks.history = mishap.history
            self.disks.change_output(mishap.output)
            self.do_now(lambda: self.launcher.behave(mishap.launcher))
            self.kill = mishap.kill

    def do_now(self, step: Callable[[], object]) -> None:
        async def at_once() -> None:
            step()
            await trio.lowlevel.checkpoint()

        self.do(at_once)

    def ask(
        self,
        call: Callable[[PlayedService], Awaitable[object]],
        refused: Callable[[Told, JobworkerError], object],
    ) -> None:
        """Make a call as a client of the service."""
        service = self.service
        assert service is not None
        self.do_now(
            lambda: service.ask(partial(call, service), lambda error: refused(service.told, error))
        )

    # --- services ---------------------------------------------------------------------------

    def start_service(self, keeps_jobs: bool = True) -> None:
        kill, self.kill = self.kill, None

        async def start() -> None:
            if not keeps_jobs:
                self.replace_launcher()
            if kill is not None:
                await self.start_and_kill(kill)
            self.service = await self.start_one()
            if self.service is None:  # the disk has kept it from that
                self.disks.mend()
                self.service = await self.start_one()
                assert self.service is not None

        self.do(start)

    async def start_one(self) -> PlayedService | None:
        service = None
        try:
            service = await PlayedService.start(
                self.run.nursery, self.directory, self.launcher, self.told
            )
        except* JobworkerError:
            pass
        return service

    async def start_and_kill(self, kill: Kill) -> None:
        """Start a service, and kill it before it has taken over, or thereafter."""

        async def start() -> None:
            with trio.CancelScope() as starting:
                nursery.start_soon(end, starting)
                await self.start_one()

        async def end(starting: trio.CancelScope) -> None:
            await self.let_pass(kill.turns)
            link = self.launcher.service
            if isinstance(link, ServiceLink) and isinstance(link.service, PlayedService):
                await self.kill_service(link.service)
            else:
                self.directory = self.copy_of_disk()
                if link is not None:
                    link.die()
            starting.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
        if not kill.keeps_jobs:
            self.replace_launcher()

    async def kill_service(self, service: PlayedService) -> None:
        """Have the service be gone as SIGKILL has it: see `PlayedService.die`."""
        self.told.expect_kill(service.supervisor, self.launcher, self.disks.output_was_full)
        self.told = self.told.copy()  # what its clients seem to hear from now on counts no more
        left, history = self.copy_of_disk(), self.disks.history
        self.disks.history = ""
        await service.die()
        self.disks.history = history
        self.directory, self.service = left, None

    def replace_launcher(self) -> None:
        """Have the launcher and all programs be gone, and another be there."""
        self.told.expect_loss(now())
        self.launcher.die()
        self.launcher = KeptLauncher(self.behaviours, self.executed)

    # --- what is there ----------------------------------------------------------------------

    def job(self, which: int) -> JobId:
        """One of those that clients know: mostly one whose end they have not heard of."""
        known = set(self.told.ids.values())
        open_ones = known - self.told.ends.keys() - self.told.removing
        jobs = sorted(open_ones if open_ones and which % 3 else known)
        return jobs[which % len(jobs)]

    def program_of(self, job: JobId) -> Program | None:
        return next((each for each in self.executed if each.job == job), None)

    def check_output(self, job: JobId, found: dict[str, bytes]) -> None:
        program = self.program_of(job)
        wrote = program.wrote if program is not None else (b"", b"")
        for stream, data in zip(wrote, (found["stdout"], found["stderr"]), strict=True):
            assert bytes(stream[: len(data)]) == data

    def check_left(self) -> None:
        assert self.service is not None
        supervisor = self.service.supervisor
        assert (supervisor._live, supervisor._places.taken) == ({}, 0)
        self.check_incidents()
        self.service = None

    def check_incidents(self) -> None:
        assert self.service is not None
        assert self.service.incidents.statistics() == {}, "a fault that no code foresaw"
