"""The launcher client: the service's calls to the launcher, and the ends of its jobs.

`LauncherClient` runs in Trio. It has a method for each operation of `sandbox.protocol.operations`
that the service uses. Its `Exchange` carries requests and replies. The end of a job arrives as an
event, and its `JobEnds` passes it to the job's execution. When the launcher ends, every waiting
request fails and every job's channel closes, at once.
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
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits
from jobworker.sandbox.protocol import operations as ops
from jobworker.sandbox.protocol import requests
from jobworker.sandbox.protocol.end_requests import EndRequest
from jobworker.sandbox.service import launcher_errors as errors
from jobworker.sandbox.service.exchange import Exchange, Waitable, log
from jobworker.sandbox.service.job_ends import Exits, JobEnds, Started
from jobworker.sandbox.service.job_reports import KeptJob, usage_from
from jobworker.sandbox.service.launch import LauncherProcess, OpenedLauncher
from jobworker.sandbox.start.plan import Order
from jobworker.threads import in_thread

FAREWELL_SECONDS = 20.0
"""How long the service waits for the end of its own launcher."""


def _exchange_of(link: "LauncherClient") -> Exchange:
    return Exchange(link._sock, link._ends.on_event)


@define(eq=False)
class LauncherClient:
    """Requests to the launcher, and the ends of its jobs. Made by `open_launcher_client`."""

    _sock: trio.socket.SocketType
    inherited: Mapping[JobId, tuple[Started, Exits]] = Factory(dict)
    """Jobs of an earlier service. The caller takes each over, or removes it and its pipes."""
    unstarted: frozenset[int] = frozenset()
    """Jobs that an earlier service asked to start, and whose program was not executed."""
    keeps_asks: bool = False
    """Whether the launcher keeps the reason of a signal for the next service, and can give up a
    start."""
    _ends: JobEnds = field(factory=JobEnds, init=False)
    _exchange: Exchange = field(default=Factory(_exchange_of, takes_self=True), init=False)

    @property
    def silent(self) -> bool:
        """Whether the launcher runs and has not answered for 10 s."""
        return self._exchange.silent

    @property
    def gone(self) -> trio.Event:
        """Set once the launcher has ended. Then none of its jobs is alive."""
        return self._exchange.gone

    def inherit(self, jobs: Iterable[KeptJob]) -> None:
        """Open the channels of jobs that the launcher has kept. Call it before `serve`."""
        self.inherited = {JobId(listed.job): self._ends.inherit(listed) for listed in jobs}

    async def serve(self) -> None:
        """Receive replies and events, until the launcher has ended and all requests have failed."""
        try:
            await self._exchange.serve()
        finally:
            self.give_up()

    async def watch_silence(self) -> None:
        """Set `silent` while the launcher answers nothing; never returns."""
        await self._exchange.watch_silence()

    async def wait_unless_silent(self, event: Waitable) -> None:
        """Wait for `event`, which only the launcher can cause. Raises LauncherSilent meanwhile."""
        await self._exchange.wait_unless_silent(event)

    def give_up(self) -> None:
        """Fail all waiting requests, send no more, and close the channels of all jobs.

        For the end of the launcher, and for the end of this service, which no request may delay.
        In the latter case a waiting request raises LauncherSilent.
        """
        self._exchange.give_up()
        self._ends.close()

    async def spawn(self, job: JobId, order: Order, limits: ScopeLimits) -> tuple[Started, Exits]:
        """Start a job, and return it with the channel for its end.

        Raises SandboxError (or CommandNotFound, CommandNotExecutable) if a step of the start
        fails, and OutOfDescriptors if this process cannot open the job's pipes; then nothing of
        the job is left. The call cannot be cancelled, see `Exchange.request`.
        """
        _check_descriptors()
        exits, notices = self._ends.expect(job)
        try:
            request = requests.Spawn(job, order, limits)
            reply, (stdout, stderr) = await self._exchange.request(ops.SPAWN, request)
        except BaseException as error:
            self._ends.expect_no_more(job)
            exits.close()
            if isinstance(error, JobworkerError) and errors.reply_was_lost(error):
                # The job may run, but its pipes are lost: remove it.
                error.data["may_have_run"] = True
                with suppress(JobworkerError):
                    await self.remove(job)
            raise
        return Started(pid=reply.pid, stdout=stdout, stderr=stderr, notices=notices), exits

    async def plan(self, order: Order, limits: ScopeLimits) -> list[tuple[str, str, str]]:
        """The steps of a job's start, each as (name, subject, what it does). Starts nothing.

        Raises the error that would refuse the job before its first step.
        """
        reply, _ = await self._exchange.request(ops.PLAN, requests.PlanOf(order, limits))
        return list(reply.steps)

    async def signal(
        self, job: JobId, number: signal.Signals, ask: EndRequest | None = None
    ) -> bool:
        """Send a signal to the job's first process; False if that has no handler for it.

        The launcher keeps `ask`, the reason, for the next service, if it can.
        """
        request = requests.Signal(job, int(number), self._if_kept(ask))
        reply, _ = await self._exchange.request(ops.SIGNAL, request)
        return reply.delivered

    async def kill(self, job: JobId, ask: EndRequest | None = None) -> None:
        """Kill every process of the job by SIGKILL; its `JobExit` follows. `ask` as in `signal`."""
        await self._exchange.request(ops.KILL, requests.Kill(job, self._if_kept(ask)))

    def _if_kept(self, ask: EndRequest | None) -> EndRequest | None:
        return ask if self.keeps_asks else None

    async def give_up_start(self, job: JobId) -> None:
        """Make a start fail, if the launcher can; a program that runs already is not stopped."""
        if self.keeps_asks:
            await self._exchange.request(ops.GIVE_UP, requests.GiveUpStart(job))

    async def remove(self, job: JobId) -> None:
        """Remove a job with its scope and files from the launcher; a live job is killed.

        Returns when the job's slot is free.
        """
        await self._exchange.request(ops.REMOVE, requests.Remove(job))

    async def begin_to_remove(self, job: JobId) -> None:
        """As `remove`, but return once the request is sent, without waiting for a free slot."""
        await self._exchange.send(requests.Remove(job))

    async def usage(self, job: JobId) -> Usage:
        """The job's usage so far."""
        reply, _ = await self._exchange.request(ops.USAGE, requests.UsageOf(job))
        return usage_from(reply)

    async def promised_bytes(self) -> int:
        """How many bytes the disks and thin volumes of live jobs may still take together."""
        reply, _ = await self._exchange.request(ops.PROMISED, requests.PromisedBytes())
        return reply.bytes

    async def make_volume(self, name: str, size_bytes: int, *, thin: bool) -> None:
        """Make a volume, reserved unless it is thin."""
        await self._exchange.request(ops.MAKE_VOLUME, requests.MakeVolume(name, size_bytes, thin))

    async def remove_volume(self, name: str) -> None:
        """Remove a volume that no live job has."""
        await self._exchange.request(ops.REMOVE_VOLUME, requests.RemoveVolume(name))

    async def volumes(self) -> tuple[Volume, ...]:
        """All volumes, sorted by name."""
        reply, _ = await self._exchange.request(ops.LIST_VOLUMES, requests.ListVolumes())
        return tuple(Volume(**volume._asdict()) for volume in reply.volumes)


@asynccontextmanager
async def open_launcher_client(launcher: OpenedLauncher) -> AsyncIterator[LauncherClient]:
    """Open a launcher client.

    At exit the connection closes. A launcher that this service has started ends then with its jobs,
    and this waits for it.
    """
    sock = trio.socket.from_stdlib_socket(launcher.sock)
    link = LauncherClient(sock, unstarted=launcher.unstarted, keeps_asks=launcher.keeps_asks)
    link.inherit(launcher.jobs)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.serve)
            nursery.start_soon(link.watch_silence)
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
    """Wait for the end of the launcher, and kill it after `FAREWELL_SECONDS`.

    A service that has given up root's rights cannot kill it. Then it logs the process id.
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
    """Raise OutOfDescriptors if this process cannot open two descriptors for a job's pipes."""
    found = list[int]()
    try:
        while len(found) < 2:
            found.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        raise errors.out_of_descriptors() from None
    finally:
        channel.close_all(found)
