"""A supervisor over a launcher and a history that are not there."""

import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import trio
import trio.testing
from attrs import Factory, define, evolve

from jobworker.errors import InternalError, LauncherSilent, NotFound, SandboxError
from jobworker.incidents import Incidents
from jobworker.jobs.archive import Archive
from jobworker.jobs.history.search import Filter, Page
from jobworker.jobs.inheritance import Takeover
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.jobs.rules import Clock, Rules
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import JobId, JobRecord, JobSpec, Limits, Usage
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.service.job_reports import EarlierEndRequest, JobExit
from jobworker.sandbox.start.plan import Order
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

RULES = Rules(
    defaults=Limits(cpu_percent=0, memory_bytes=0, io_bps=0, processes=0, output_bytes=0),
    timeout_seconds=0,
    stop_grace_seconds=5,
    at_max_output="discard-output",
    on_disk_full="discard-output",
)


@define(eq=False)
class FakeLink:
    """Starts nothing; a job runs until `finish`."""

    spawned: list[JobId] = Factory(list)
    removed: list[JobId] = Factory(list)
    killed: dict[JobId, float] = Factory(dict)
    """When each job was killed, by Trio's clock."""
    planned: list[Order] = Factory(list)
    silent: bool = False
    given_up: bool = False
    keeps_asks: bool = True
    stuck: bool = False
    """Whether no start is ever answered."""
    sends: bool = True
    """Whether starts reach the launcher."""
    refusals: int = 0
    """How many requests to remove a job are refused before one is taken."""
    forgets_nothing: bool = False
    """Whether a request to remove a job fails once this was given up."""
    asked_to_remove: trio.Event = Factory(trio.Event)
    may_remove: trio.Event | None = None
    """Set when a job may be removed, if that waits for something."""
    let_go: trio.Event = Factory(trio.Event)
    used: Usage | None = None
    """What each job uses now; None if the launcher refuses to tell."""
    _jobs: dict[JobId, tuple[trio.MemorySendChannel[JobExit], list[int]]] = Factory(dict)
    _notices: dict[JobId, trio.MemorySendChannel[str]] = Factory(dict)

    async def spawn(self, job: JobId, *_: object) -> tuple[Started, Exits]:
        await trio.lowlevel.checkpoint()
        if self.stuck:
            with trio.CancelScope(shield=True):
                await self.let_go.wait()
            data = {} if self.sends else {"sent": False}
            raise LauncherSilent("cannot tell what becomes of the request", data=data)
        self.spawned.append(job)
        return self.begin(job)

    def begin(
        self, job: JobId, *, asked: EarlierEndRequest | None = None, seconds_ago: float = 0
    ) -> tuple[Started, Exits]:
        """Have a job run since so many seconds, with what an earlier service has asked for."""
        send, receive = trio.open_memory_channel[JobExit](1)
        self._notices[job], notices = trio.open_memory_channel[str](8)
        (out, out_write), (err, err_write) = (os.pipe2(os.O_NONBLOCK) for _ in range(2))
        self._jobs[job] = send, [out_write, err_write]
        since = time.monotonic() - seconds_ago
        started = Started(pid=1, stdout=out, stderr=err, since=since, notices=notices, asked=asked)
        return started, receive

    def notify(self, job: JobId, words: str) -> None:
        """Tell something about a running job."""
        self._notices[job].send_nowait(words)

    async def plan(self, order: Order, _: object) -> list[tuple[str, str, str]]:
        await trio.lowlevel.checkpoint()
        self.planned.append(order)
        return [("step", "does", "something")]

    async def usage(self, _: JobId) -> Usage:
        await trio.lowlevel.checkpoint()
        if self.used is None:
            raise NotFound("no such job")
        return self.used

    def write(self, job: JobId, data: bytes) -> None:
        """Have a job write to both of its streams."""
        for pipe in self._jobs[job][1]:
            os.write(pipe, data)

    def finish(
        self,
        job: JobId,
        *,
        keep_pipes: bool = False,
        unseen: tuple[str, ...] = (),
        signal: int | None = None,
    ) -> list[int]:
        """Have a job exit with 0, or end by a signal: the ends of its pipes that somebody keeps."""
        send, pipes = self._jobs.pop(job)
        self._notices.pop(job).close()
        while pipes and not keep_pipes:
            os.close(pipes.pop())
        code = 0 if signal is None else None
        send.send_nowait(JobExit(code=code, signal=signal, usage=Usage(), unseen=unseen))
        send.close()
        return pipes

    async def signal(self, *_: object) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def wait_unless_silent(self, event: trio.Event) -> None:
        if self.silent and not event.is_set():
            raise LauncherSilent("cannot serve the request: the launcher does not answer")
        await event.wait()

    def give_up(self) -> None:
        self.given_up = True
        self.let_go.set()

    async def give_up_start(self, _: JobId) -> None:
        await trio.lowlevel.checkpoint()

    async def kill(self, job: JobId, *_: object) -> None:
        await trio.lowlevel.checkpoint()
        if self.given_up or self.silent:
            raise LauncherSilent("cannot tell what becomes of the request")
        self.killed[job] = trio.current_time()
        self.finish(job, signal=signal.SIGKILL)

    def let_remove(self) -> None:
        """End the wait for `may_remove`."""
        assert self.may_remove is not None
        self.may_remove.set()

    async def remove(self, job: JobId) -> None:
        self.asked_to_remove.set()
        if self.may_remove is not None:
            await self.may_remove.wait()
        with trio.CancelScope(shield=True):  # what was asked of a launcher has its effect
            await trio.lowlevel.checkpoint()
        if self.given_up and self.forgets_nothing:
            raise LauncherSilent("the service is shutting down", data={"sent": False})
        if self.refusals:
            self.refusals -= 1
            raise SandboxError("cannot serve the request: Too many open files")
        self.removed.append(job)


@define(eq=False)
class FakeHistory:
    """Remembers the records, in memory."""

    records: dict[JobId, JobRecord] = Factory(dict)
    notes: dict[JobId, JobRecord] = Factory(dict)
    _last: int = 0

    def take_id(self) -> JobId:
        self._last += 1
        return JobId(self._last)

    def keep_id(self, job: JobId) -> None:
        assert job <= self._last

    held: trio.Event | None = None
    """Set when a job that is being admitted is refused, if that waits for something."""
    slow: trio.Event | None = None
    """Set when what changes of a job is recorded, if that waits for something."""

    async def put(self, record: JobRecord, *, is_new: bool = False) -> None:
        if is_new and self.held is not None:
            await self.held.wait()
            raise InternalError("cannot record the job: another program has locked the history")
        if self.slow is not None:
            with trio.CancelScope(shield=True):
                await self.slow.wait()
        await trio.lowlevel.checkpoint()
        self.records[record.id] = record

    async def keep_note(self, record: JobRecord) -> None:
        await trio.lowlevel.checkpoint()
        self.notes[record.id] = record

    async def remove(self, job: JobId) -> None:
        await trio.lowlevel.checkpoint()
        self.records.pop(job, None)

    async def summary(self, job: JobId, _who: str = "") -> JobRecord | None:
        await trio.lowlevel.checkpoint()
        return self.records.get(job)

    async def mark_output_removed(self, jobs: Collection[JobId], when: datetime) -> None:
        await trio.lowlevel.checkpoint()
        for job in jobs:
            self.records[job] = evolve(self.records[job], output_removed_at=when)

    async def page(self, wanted: Filter, limit: int, _: str) -> Page:
        await trio.lowlevel.checkpoint()
        fit = [each for each in self.records.values() if wanted.fits(each)]
        return Page([(each.id, dumps(unstructure(each))) for each in fit[:limit]], None)


@asynccontextmanager
async def supervising(
    spools: Path,
    *,
    max_running: int,
    max_waiting: int = 100,
    clock: Clock = lambda: datetime.now(UTC),
    inheritance: Takeover | None = None,
    link: FakeLink | None = None,
    rules: Rules = RULES,
) -> AsyncIterator[tuple[Supervisor, FakeLink, FakeHistory]]:
    link, history = link or FakeLink(), FakeHistory()
    archive = Archive(
        spools=spools,
        history=history,  # type: ignore[arg-type]
        policy=RetentionPolicy(),
        budget=OutputBudget(spools),
        clock=clock,
    )
    supervisor = Supervisor(
        launcher=link,  # type: ignore[arg-type]
        history=history,  # type: ignore[arg-type]
        archive=archive,
        spools=spools,
        rules=rules,
        clock=clock,
        incidents=Incidents(),
        max_running=max_running,
        max_waiting=max_waiting,
    )
    supervisor.take_over(inheritance or Takeover())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.serve)
        yield supervisor, link, history
        nursery.cancel_scope.cancel()


def spec(name: str) -> JobSpec:
    return JobSpec(command=("true",), name=name)


@define(eq=False)
class SlowFirst:
    """Makes the first job's spool only when it may."""

    _create: object
    may: threading.Event = Factory(threading.Event)
    begun: threading.Event = Factory(threading.Event)

    def __call__(self, directory: Path) -> Spool:
        if directory.name == "1":
            self.begun.set()
            assert self.may.wait(20)
        return self._create(directory)  # type: ignore[no-any-return, operator]


@define(eq=False)
class HeldStep:
    """A step of a job's end that waits for the disk, until the end of the block at the latest."""

    _step: Callable[..., None]
    begun: threading.Event = Factory(threading.Event)
    may: threading.Event = Factory(threading.Event)

    def __call__(self, *arguments: object) -> None:
        self.begun.set()
        assert self.may.wait(20)
        self._step(*arguments)

    def as_method(self) -> Callable[..., None]:
        """The step, as a method of a class."""

        def step(*arguments: object) -> None:
            self(*arguments)

        return step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.may.set()
