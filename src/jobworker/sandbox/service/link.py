"""The service's conversation with the launcher: ask it, hear of its jobs' ends.

`Link` belongs to Trio. It has a call for each operation of `sandbox.protocol.operations` that the
service uses. Requests and replies go over its `Exchange`; ends of jobs arrive as events and go to
whoever expects them, by its `JobEnds`. When the launcher goes, every waiting request and every job
hears of it at once.
"""

import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress

import trio
from attrs import Factory, define, field

from jobworker.errors import JobworkerError
from jobworker.model.job import JobId, Usage
from jobworker.model.volumes import Volume
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.hierarchy import Limits
from jobworker.sandbox.protocol import operations as ops
from jobworker.sandbox.protocol import requests
from jobworker.sandbox.protocol.asks import Ask
from jobworker.sandbox.service import launcher_errors as errors
from jobworker.sandbox.service.exchange import Exchange, Waitable, log
from jobworker.sandbox.service.job_ends import Exits, JobEnds, Started
from jobworker.sandbox.service.jobs_told import Listed, usage_from
from jobworker.sandbox.service.launch import LauncherProcess, OpenedLauncher
from jobworker.sandbox.start.plan import Order
from jobworker.threads import in_thread

FAREWELL_SECONDS = 20.0
"""How long a launcher of the service's own may take to end."""


def _exchange_of(link: "Link") -> Exchange:
    return Exchange(link._sock, link._ends.on_event)


@define(eq=False)
class Link:
    """Requests to the launcher, and the ends of its jobs. Made by `open_link`."""

    _sock: trio.socket.SocketType
    inherited: Mapping[JobId, tuple[Started, Exits]] = Factory(dict)
    """Jobs of an earlier service: to be taken over, or removed and their pipes closed."""
    unstarted: frozenset[int] = frozenset()
    """Jobs that an earlier service wanted started and whose program was not executed."""
    keeps_asks: bool = False
    """Whether the launcher keeps why a job was sent a signal, for the next service, and gives up
    starts."""
    _ends: JobEnds = field(factory=JobEnds, init=False)
    _exchange: Exchange = field(default=Factory(_exchange_of, takes_self=True), init=False)

    @property
    def silent(self) -> bool:
        """Whether the launcher is there and has not answered for a while."""
        return self._exchange.silent

    @property
    def gone(self) -> trio.Event:
        """Set once the launcher has ended; no job of it is alive then."""
        return self._exchange.gone

    def inherit(self, jobs: Iterable[Listed]) -> None:
        """Expect the ends of jobs that the launcher has kept: before `serve`."""
        self.inherited = {JobId(listed.job): self._ends.inherit(listed) for listed in jobs}

    async def serve(self) -> None:
        """Hand out what the launcher sends; returns once it is gone, everyone woken."""
        try:
            await self._exchange.serve()
        finally:
            self.give_up()

    async def listen(self) -> None:
        """Notice where the launcher answers nothing (`silent`); never returns."""
        await self._exchange.listen()

    async def wait_unless_silent(self, event: Waitable) -> None:
        """Wait for what only a launcher that answers can bring about. Raises LauncherSilent."""
        await self._exchange.wait_unless_silent(event)

    def give_up(self) -> None:
        """Ask nothing more: no request waits longer, be it for an answer or to be sent, and no
        job's end is told any more.

        For the end of the launcher, and for that of a service, which no request may hold up:
        whoever waits gets LauncherSilent then.
        """
        self._exchange.give_up()
        self._ends.close()

    async def spawn(self, job: JobId, order: Order, limits: Limits) -> tuple[Started, Exits]:
        """Start a job; the channel gets its one `Exit`, or closes if the launcher goes.

        Raises SandboxError (or CommandNotFound, CommandNotExecutable) if a step of the start
        fails, and OutOfDescriptors where this process cannot take the job's pipes; then nothing
        of the job is left. Not to be cancelled: see `Exchange.ask`.
        """
        _check_descriptors()
        exits, notices = self._ends.expect(job)
        try:
            request = requests.Spawn(job, order, limits)
            told, (stdout, stderr) = await self._exchange.ask(ops.SPAWN, request)
        except BaseException as error:
            self._ends.expect_no_more(job)
            exits.close()
            if isinstance(error, JobworkerError) and errors.reply_was_lost(error):
                # It may run, and nobody could read from it.
                error.data["may_have_run"] = True
                with suppress(JobworkerError):
                    await self.remove(job)
            raise
        return Started(pid=told.pid, stdout=stdout, stderr=stderr, notices=notices), exits

    async def plan(self, order: Order, limits: Limits) -> list[tuple[str, str, str]]:
        """The steps by which a job would be started, each with its subject and what it does.

        Raises what would refuse the job before its first step.
        """
        told, _ = await self._exchange.ask(ops.PLAN, requests.PlanOf(order, limits))
        return list(told.steps)

    async def signal(self, job: JobId, number: signal.Signals, ask: Ask | None = None) -> bool:
        """Send a signal to the job's first process; False if that has no handler for it.

        The launcher keeps `ask` for the next service, if it can.
        """
        request = requests.Signal(job, int(number), self._kept(ask))
        told, _ = await self._exchange.ask(ops.SIGNAL, request)
        return told.delivered

    async def kill(self, job: JobId, ask: Ask | None = None) -> None:
        """End every process of the job with SIGKILL, and have `ask` kept; its `Exit` follows."""
        await self._exchange.ask(ops.KILL, requests.Kill(job, self._kept(ask)))

    def _kept(self, ask: Ask | None) -> Ask | None:
        return ask if self.keeps_asks else None

    async def give_up_start(self, job: JobId) -> None:
        """Have a start under way fail, if the launcher can; a program that runs goes on."""
        if self.keeps_asks:
            await self._exchange.ask(ops.GIVE_UP, requests.GiveUpStart(job))

    async def remove(self, job: JobId) -> None:
        """Have the launcher forget a job, with its scope and files; a live one is killed.

        Returns when its place is free.
        """
        await self._exchange.ask(ops.REMOVE, requests.Remove(job))

    async def begin_to_remove(self, job: JobId) -> None:
        """As `remove`, but return at once: what holds its place holds up nothing here."""
        await self._exchange.tell(requests.Remove(job))

    async def usage(self, job: JobId) -> Usage:
        """What the job has used so far."""
        told, _ = await self._exchange.ask(ops.USAGE, requests.UsageOf(job))
        return usage_from(told)

    async def promised_bytes(self) -> int:
        """How much may still be written to the disks and volumes of live jobs."""
        told, _ = await self._exchange.ask(ops.PROMISED, requests.PromisedBytes())
        return told.bytes

    async def make_volume(self, name: str, size_bytes: int, *, thin: bool) -> None:
        """Make a volume, reserved unless it is thin."""
        await self._exchange.ask(ops.MAKE_VOLUME, requests.MakeVolume(name, size_bytes, thin))

    async def remove_volume(self, name: str) -> None:
        """Remove a volume that no live job has."""
        await self._exchange.ask(ops.REMOVE_VOLUME, requests.RemoveVolume(name))

    async def volumes(self) -> tuple[Volume, ...]:
        """All volumes, by name."""
        told, _ = await self._exchange.ask(ops.LIST_VOLUMES, requests.ListVolumes())
        return tuple(Volume(**volume._asdict()) for volume in told.volumes)


@asynccontextmanager
async def open_link(launcher: OpenedLauncher) -> AsyncIterator[Link]:
    """Talk to a launcher; at exit one of our own ends with its jobs, and is waited for."""
    sock = trio.socket.from_stdlib_socket(launcher.sock)
    link = Link(sock, unstarted=launcher.unstarted, keeps_asks=launcher.keeps_asks)
    link.inherit(launcher.jobs)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.serve)
            nursery.start_soon(link.listen)
            try:
                yield link
            finally:
                sock.shutdown(socket.SHUT_WR)
                if isinstance(launcher, LauncherProcess):
                    with trio.CancelScope(shield=True):
                        await _reap(launcher.process)
                nursery.cancel_scope.cancel()
    finally:
        sock.close()


async def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for the launcher, which bounds its own farewell; kill it if it breaks its word.

    A service that has given up root's rights may not: then it says what it leaves behind.
    """
    with trio.move_on_after(FAREWELL_SECONDS):
        await in_thread(process.wait, abandon_on_cancel=True)
    if process.returncode is None:
        try:
            process.kill()
        except PermissionError:
            log.error(
                "the launcher has not ended in %g s and is left with its jobs: process %d",
                FAREWELL_SECONDS,
                process.pid,
            )


def _check_descriptors() -> None:
    """Raise OutOfDescriptors where there is no room for a job's pipes: before it is started."""
    found = list[int]()
    try:
        while len(found) < 2:
            found.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        raise errors.out_of_descriptors() from None
    finally:
        channel.close_all(found)
