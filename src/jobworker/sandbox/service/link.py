"""The service's conversation with the launcher: ask it, hear of its jobs' ends.

`Link` belongs to Trio: requests may overlap, replies are told apart by number, exits arrive as
events for whoever expects them. When the launcher goes, every waiting request and every job hears
of it at once (`LauncherGone`); nothing hangs.
"""

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from types import MappingProxyType
from typing import Protocol

import trio
from attrs import Factory, define, frozen

from jobworker.errors import JobworkerError, LauncherGone, LauncherSilent, OutOfDescriptors
from jobworker.model.job import JobId, Usage
from jobworker.model.volumes import Volume
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.hierarchy import Limits
from jobworker.sandbox.protocol.asks import Ask
from jobworker.sandbox.service.launch import (
    AskedBefore,
    Exit,
    LauncherProcess,
    Listed,
    OpenedLauncher,
    exit_from,
    usage_from,
)
from jobworker.sandbox.service.start_failures import explain
from jobworker.sandbox.start.plan import Order
from jobworker.threads import in_thread

Notices = trio.MemoryReceiveChannel[str]
"""What the launcher tells of a job while it runs, in words; closes with its end."""
NOTICES_KEPT = 8


def _no_notices() -> Notices:
    send, receive = trio.open_memory_channel[str](0)
    send.close()
    return receive


@frozen(kw_only=True)
class Started:
    """A running job: its process, and the read ends of its pipes, which the receiver owns."""

    pid: int
    stdout: int
    stderr: int
    since: float = Factory(time.monotonic)
    notices: Notices = Factory(_no_notices)
    asked: AskedBefore | None = None
    """What an earlier service has asked for of its end."""

    @property
    def age_seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self.since


log = logging.getLogger("jobworker.sandbox")

SILENT_SECONDS = 10.0
"""The launcher's turns take milliseconds (`sandbox.event_loop`)."""
FAREWELL_SECONDS = 20.0
"""How long a launcher of the service's own may take to end."""
LOOK_SECONDS = 1.0

Exits = trio.MemoryReceiveChannel[Exit]
"""Gets a job's one `Exit`, or closes if the launcher goes."""


class Waitable(Protocol):
    """An event, such as trio.Event."""

    def is_set(self) -> bool:
        """Whether it has happened."""

    async def wait(self) -> None:
        """Wait until it has."""


LONG_PIECE = 16_384
"""Characters of a request after which other tasks have their turn: a quarter of a millisecond."""
_LARGE_REPLIES = frozenset({"plan", "volume.list"})
"""Operations whose reply may be too large for a packet, and then travels in a descriptor."""


@define(eq=False)
class _Waiting:
    """A request on its way."""

    operation: str
    answered: trio.Event = Factory(trio.Event)
    message: channel.Message | None = None
    descriptors: list[int] = Factory(list)
    descriptors_lost: bool = False
    """Whether this process had no room for what came with the reply."""


@define(eq=False)
class Link:
    """Requests to the launcher, and the ends of its jobs. Made by `open_link`."""

    _sock: trio.socket.SocketType
    _waiting: dict[int, _Waiting] = Factory(dict)
    _exits: dict[JobId, trio.MemorySendChannel[Exit]] = Factory(dict)
    _notices: dict[JobId, trio.MemorySendChannel[str]] = Factory(dict)
    _next: int = 1
    _sending: trio.StrictFIFOLock = Factory(trio.StrictFIFOLock)
    _unsent: dict[trio.CancelScope, bool] = Factory(dict)
    """Of what waits for its turn to be sent, or for room in the socket: whether it is patient."""
    inherited: Mapping[JobId, tuple[Started, Exits]] = Factory(dict)
    """Jobs of an earlier service: to be taken over, or removed and their pipes closed."""
    unstarted: frozenset[int] = frozenset()
    """Jobs that an earlier service wanted started and whose program was not executed."""
    keeps_asks: bool = False
    """Whether the launcher keeps why a job was sent a signal, for the next service, and gives up
    starts."""
    given_up: bool = False
    """Whether it is asked nothing more, as after `give_up`."""
    silent: bool = False
    """Whether the launcher is there and has not answered for `silent_seconds`."""
    silent_seconds: float = SILENT_SECONDS
    gone: trio.Event = Factory(trio.Event)
    """Set once the launcher has ended; no job of it is alive then."""

    def inherit(self, jobs: Iterable[Listed]) -> None:
        """Expect the ends of jobs that the launcher has kept: before `serve`."""
        taken = {}
        for listed in jobs:
            send, receive = trio.open_memory_channel[Exit](1)
            notices = self._open_notices(JobId(listed.job))
            if listed.network_end:
                self._on_network_end(JobId(listed.job), listed.network_end)
            if listed.exit is None:
                self._exits[JobId(listed.job)] = send
            else:
                send.send_nowait(listed.exit)
                send.close()
                self._notices.pop(JobId(listed.job)).close()
            started = Started(
                pid=listed.pid,
                stdout=listed.stdout,
                stderr=listed.stderr,
                since=listed.since,
                notices=notices,
                asked=listed.asked,
            )
            taken[JobId(listed.job)] = (started, receive)
        self.inherited = taken

    async def spawn(self, job: JobId, order: Order, limits: Limits) -> tuple[Started, Exits]:
        """Start a job; the channel gets its one `Exit`, or closes if the launcher goes.

        Raises SandboxError (or CommandNotFound, CommandNotExecutable) if a step of the start
        fails, and OutOfDescriptors where this process cannot take the job's pipes; then nothing
        of the job is left. Not to be cancelled: see `_ask`.
        """
        _check_descriptors()
        send, receive = trio.open_memory_channel[Exit](1)
        self._exits[job], notices = send, self._open_notices(job)
        try:
            fields = {**_order_fields(order), **limits._asdict()}
            message, descriptors = await self._ask("spawn", job, fields)
        except BaseException as error:
            self._exits.pop(job, send).close()
            if (unwanted := self._notices.pop(job, None)) is not None:
                unwanted.close()
            receive.close()
            if isinstance(error, OutOfDescriptors):  # it may run, and nobody could read from it
                error.data["may_have_run"] = True
                with suppress(JobworkerError):
                    await self.remove(job)
            raise
        stdout, stderr = descriptors
        pid = message["pid"]
        assert isinstance(pid, int)
        return Started(pid=pid, stdout=stdout, stderr=stderr, notices=notices), receive

    def _open_notices(self, job: JobId) -> Notices:
        self._notices[job], receive = trio.open_memory_channel[str](NOTICES_KEPT)
        return receive

    def _on_network_end(self, job: JobId, why: str) -> None:
        notices = self._notices.get(job)
        if notices is not None:
            with suppress(trio.WouldBlock, trio.BrokenResourceError):  # nobody wants to know
                notices.send_nowait(f"its private network ended: {why}")

    async def plan(self, order: Order, limits: Limits) -> list[tuple[str, str, str]]:
        """The steps by which a job would be started, each with its subject and what it does.

        Raises what would refuse the job before its first step.
        """
        fields = {**_order_fields(order), **limits._asdict()}
        message, _ = await self._ask("plan", None, fields, patient=False)
        steps = message["steps"]
        assert isinstance(steps, list)
        return [(str(name), str(subject), str(what)) for name, subject, what in steps]

    async def signal(self, job: JobId, number: signal.Signals, ask: Ask | None = None) -> bool:
        """Send a signal to the job's first process; False if that has no handler for it.

        The launcher keeps `ask` for the next service, if it can.
        """
        message, _ = await self._ask("signal", job, {"signal": int(number), **self._kept(ask)})
        return message["delivered"] is True

    async def kill(self, job: JobId, ask: Ask | None = None) -> None:
        """End every process of the job with SIGKILL, and have `ask` kept; its `Exit` follows."""
        await self._ask("kill", job, self._kept(ask))

    def _kept(self, ask: Ask | None) -> Mapping[str, object]:
        return ask._asdict() if ask is not None and self.keeps_asks else {}

    async def give_up_start(self, job: JobId) -> None:
        """Have a start under way fail, if the launcher can; a program that runs goes on."""
        if self.keeps_asks:
            await self._ask("give_up", job)

    async def remove(self, job: JobId) -> None:
        """Have the launcher forget a job, with its scope and files; a live one is killed.

        Returns when its place is free.
        """
        await self._ask("remove", job)

    async def begin_to_remove(self, job: JobId) -> None:
        """As `remove`, but return at once: what holds its place holds up nothing here."""
        number, self._next = self._next, self._next + 1
        await self._send({"id": number, "op": "remove", "job": job})

    async def usage(self, job: JobId) -> Usage:
        """What the job has used so far."""
        message, _ = await self._ask("usage", job, patient=False)
        return usage_from(message)

    async def promised_bytes(self) -> int:
        """How much may still be written to the disks and volumes of live jobs."""
        message, _ = await self._ask("promised", None, patient=False)
        promised = message["bytes"]
        assert isinstance(promised, int)
        return promised

    async def make_volume(self, name: str, size_bytes: int, *, thin: bool) -> None:
        """Make a volume, reserved unless it is thin."""
        fields = {"name": name, "size_bytes": size_bytes, "thin": thin}
        await self._ask("volume.create", None, fields, patient=False)

    async def remove_volume(self, name: str) -> None:
        """Remove a volume that no live job has."""
        await self._ask("volume.remove", None, {"name": name}, patient=False)

    async def volumes(self) -> tuple[Volume, ...]:
        """All volumes, by name."""
        message, _ = await self._ask("volume.list", None, patient=False)
        listed = message["volumes"]
        assert isinstance(listed, list)
        return tuple(Volume(**volume) for volume in listed)

    async def _ask(
        self,
        operation: str,
        job: JobId | None,
        fields: Mapping[str, object] = MappingProxyType({}),
        *,
        patient: bool = True,
    ) -> tuple[Mapping[str, object], list[int]]:
        """Send a request and wait for its reply.

        A request that went out has its effect, so whoever waits is shielded, until the launcher
        answers or ends, or is given up at the end of this service. A request that is not `patient`
        raises LauncherSilent where the launcher does neither; the rest, on which jobs' lives
        depend, goes on when it does.
        """
        number, self._next = self._next, self._next + 1
        waiting = self._waiting[number] = _Waiting(operation)
        with trio.CancelScope(shield=True):
            of_job = {} if job is None else {"job": job}
            try:
                message = {"id": number, "op": operation, **of_job, **fields}
                await self._send(message, patient=patient)
            except JobworkerError:  # nothing went out
                self._waiting.pop(number, None)
                raise
            if patient:
                await waiting.answered.wait()
            else:
                await self.wait_unless_silent(waiting.answered)
        if waiting.descriptors_lost:
            raise _out_of_descriptors()
        if waiting.message is None:
            raise self._unanswered()
        problem = waiting.message.get("error")
        if isinstance(problem, dict):
            raise explain(problem)
        ok = waiting.message["ok"]
        assert isinstance(ok, dict)
        return ok, waiting.descriptors

    async def wait_unless_silent(self, event: Waitable) -> None:
        """Wait for what only a launcher that answers can bring about. Raises LauncherSilent."""
        while not event.is_set():
            if self.silent:
                raise launcher_silent()
            with trio.move_on_after(LOOK_SECONDS):
                await event.wait()

    async def listen(self) -> None:
        """Notice where the launcher answers nothing (`silent`); never returns.

        A request alone cannot tell, since some take long: so it is asked for a mere answer.
        """
        while True:
            await trio.sleep(LOOK_SECONDS)
            if not self._waiting or self.given_up:
                continue
            with trio.move_on_after(self.silent_seconds):
                await self._ping()
                continue
            await self._be_silent()

    async def _ping(self) -> bool:
        """Ask for an answer, and nothing else: whether one came. May be cancelled."""
        number, self._next = self._next, self._next + 1
        waiting = self._waiting[number] = _Waiting("ping")
        try:
            await self._send({"id": number, "op": "ping"})
            await waiting.answered.wait()
            return waiting.message is not None
        except JobworkerError:  # it was given up before that was sent
            return False
        finally:
            self._waiting.pop(number, None)

    async def _be_silent(self) -> None:
        log.error(
            "the launcher has not answered for %.0f s: see what holds it", self.silent_seconds
        )
        self.silent = True
        for unsent, patient in self._unsent.items():
            if not patient:
                unsent.cancel()
        try:
            if await self._ping():  # else it is gone, or was given up
                log.warning("the launcher answers again")
        finally:
            self.silent = False

    async def _send(self, message: channel.Message, *, patient: bool = True) -> None:
        """Send a message as soon as there is room for it.

        Raises LauncherSilent or LauncherGone where the launcher is given up before, or is silent
        and the message not `patient`. Nothing of it went out then: the socket takes a packet as a
        whole.
        """
        body = await _body_of(message)
        if self.given_up or (self.silent and not patient):
            raise self._not_sent()
        try:
            packet, ancillary, mine = channel.pack(body, ())
        except OSError as error:  # a large message travels in a descriptor
            raise _out_of_descriptors() from error
        with trio.CancelScope() as scope:
            self._unsent[scope] = patient
            try:
                try:
                    self._sending.acquire_nowait()  # a turn of the loop less
                except trio.WouldBlock:
                    await self._sending.acquire()
                try:
                    await self._sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)
                finally:
                    self._sending.release()
            except OSError:
                await self.gone.wait()  # the reader sees the end of the stream too
            finally:
                del self._unsent[scope]
                channel.close_all(mine)
        if scope.cancelled_caught:
            raise self._not_sent()

    async def serve(self) -> None:
        """Hand out what the launcher sends; returns once it is gone, everyone woken."""
        try:
            while True:
                packet, ancillary, flags, _ = await self._sock.recvmsg(
                    channel.PACKET_BYTES, channel.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
                if not packet:
                    return
                try:
                    message, descriptors = channel.decode(packet, ancillary, flags)
                except channel.BadMessage as bad:
                    channel.close_all(bad.descriptors)
                    if not isinstance(bad, channel.DescriptorsLost):
                        return
                    self._dispatch_without_descriptors(bad.said)
                else:
                    self._dispatch(message, descriptors)
        except (OSError, JobworkerError):
            return  # reset: the same as its end
        finally:
            self.gone.set()
            self.give_up()

    def _not_sent(self) -> JobworkerError:
        if self.gone.is_set():
            return _launcher_gone()
        if not self.given_up:
            return launcher_silent()
        return LauncherSilent(
            "cannot serve the request: the service is shutting down, and the launcher takes none",
            remedy="try again once the next service is there",
            data={"sent": False},
        )

    def _unanswered(self) -> JobworkerError:
        if self.gone.is_set():
            return _launcher_gone()
        return LauncherSilent(
            "cannot tell what becomes of the request: the service is shutting down, and the "
            "launcher has not answered",
            remedy="see what became of it once the next service is there",
        )

    def give_up(self) -> None:
        """Ask nothing more: no request waits longer, be it for an answer or to be sent, and no
        job's end is told any more.

        For the end of the launcher, and for that of a service, which no request may hold up:
        whoever waits gets LauncherSilent then.
        """
        self.given_up = True
        for unsent in self._unsent:
            unsent.cancel()
        for waiting in self._waiting.values():
            waiting.answered.set()
        self._waiting.clear()
        for channels in (self._exits, self._notices):
            for each in channels.values():
                each.close()
            channels.clear()

    def _dispatch(self, message: channel.Message, descriptors: list[int]) -> None:
        if message.get("event") == "exit":
            channel.close_all(descriptors)
            job = message["job"]
            assert isinstance(job, int)
            if (notices := self._notices.pop(JobId(job), None)) is not None:
                notices.close()
            exits = self._exits.pop(JobId(job), None)
            if exits is not None:
                with suppress(trio.BrokenResourceError):  # nobody wants to know any more
                    exits.send_nowait(exit_from(message))
                exits.close()
            return
        if message.get("event") == "network_ended":
            channel.close_all(descriptors)
            job = message["job"]
            assert isinstance(job, int)
            self._on_network_end(JobId(job), str(message["why"]))
            return
        answered = message.get("id")
        waiting = self._waiting.pop(answered, None) if isinstance(answered, int) else None
        if waiting is None:
            channel.close_all(descriptors)
            return
        waiting.message, waiting.descriptors = message, descriptors
        waiting.answered.set()

    def _dispatch_without_descriptors(self, message: channel.Message | None) -> None:
        """Fail the request whose reply came in part; where it cannot be told which, all it may be.

        Such a request had its effect, or has to be made again.
        """
        for number, waiting in list(self._waiting.items()):
            if message.get("id") == number if message else waiting.operation in _LARGE_REPLIES:
                del self._waiting[number]
                waiting.descriptors_lost = True
                waiting.answered.set()


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


def _order_fields(order: Order) -> dict[str, object]:
    """What `requests.parse` makes an order of."""
    return {
        **order._asdict(),
        "arguments": list(order.arguments),
        "environment": dict(order.environment),
        "volumes": [list(volume) for volume in order.volumes],
    }


def _check_descriptors() -> None:
    """Raise OutOfDescriptors where there is no room for a job's pipes: before it is started."""
    found = list[int]()
    try:
        while len(found) < 2:
            found.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        raise _out_of_descriptors() from None
    finally:
        channel.close_all(found)


def _out_of_descriptors() -> OutOfDescriptors:
    return OutOfDescriptors(
        "cannot serve the request: the service has no file descriptor left for it",
        remedy="try again later, or raise the service's LimitNOFILE",
    )


def _launcher_gone() -> LauncherGone:
    return LauncherGone(
        "cannot serve the request: the launcher has ended", remedy="restart the service"
    )


def launcher_silent(job: JobId | None = None) -> LauncherSilent:
    """The error for a request that a silent launcher keeps waiting; `job` goes on when it can."""
    if job is None:
        return LauncherSilent(
            "cannot serve the request: the launcher does not answer",
            remedy="see what holds it (ps, systemctl status worker-launcher); it goes on by itself",
        )
    return LauncherSilent(
        f"cannot tell what becomes of job {job}: the launcher does not answer",
        remedy=f"do not run it again: job {job} goes on when the launcher does; "
        f"see `worker-cli status {job}`, or stop it",
        data={"job": job},
    )


async def _body_of(message: channel.Message) -> bytes:
    """Encode a message; other tasks have turns meanwhile where it is long."""
    body, made = list[str](), 0
    for piece in channel.pieces(message):
        body.append(piece)
        made += len(piece)
        if made > LONG_PIECE:
            made = 0
            await trio.lowlevel.checkpoint()
    return "".join(body).encode()
