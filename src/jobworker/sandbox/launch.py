"""The service's side of the launcher: start it, ask it, hear of its jobs' ends.

`start_launcher` runs before Trio and before privileges are dropped. `Link` then belongs to
Trio: requests may overlap, replies are told apart by number, exits arrive as events for whoever
expects them. When the launcher goes, every waiting request and every job hears of it at once
(`LauncherGone`); nothing hangs.
"""

import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from attrs import Factory, define, frozen

import jobworker
from jobworker.errors import (
    HostUnsupported,
    JobworkerError,
    LauncherGone,
    error_classes,
)
from jobworker.model.job import JobId, Usage
from jobworker.sandbox import channel
from jobworker.sandbox.cgroups import Limits
from jobworker.sandbox.children import Policy, policy_message
from jobworker.sandbox.plan import Order
from jobworker.sandbox.start_failures import explain

START_SECONDS = 30
_BOOTSTRAP = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from jobworker.sandbox.launcher import main; main(int(sys.argv[2]))"
)


@frozen(kw_only=True)
class Exit:
    """How a job's first process ended: its code, or the signal that ended it."""

    code: int | None
    signal: int | None
    usage: Usage


@frozen(kw_only=True)
class Started:
    """A running job: its process, and the read ends of its pipes, which the receiver owns."""

    pid: int
    stdout: int
    stderr: int


@frozen(kw_only=True)
class LauncherProcess:
    """A launcher that is ready: its process, our end of the socket, and what it found."""

    process: subprocess.Popen[bytes]
    sock: socket.socket
    cgroup_kind: str
    gaps: tuple[str, ...]
    """What this host cannot enforce, in words."""


def start_launcher(policy: Policy) -> LauncherProcess:
    """Start a launcher and wait until it is ready; raises what it could not do.

    Call as root, from a process of one thread, before Trio runs.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    source = str(Path(jobworker.__file__).resolve().parent.parent)
    number = far.fileno()
    with far:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _BOOTSTRAP, source, str(number)],
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,  # Ctrl-C is the service's to handle
        )
    try:
        near.settimeout(START_SECONDS)
        channel.send(near, policy_message(policy))
        received = channel.receive(near)
        if received is None:
            raise HostUnsupported("cannot start the launcher: it ended without a word")
        message, _ = received
        problem = message.get("error")
        if isinstance(problem, dict):
            cls = error_classes().get(problem["code"], HostUnsupported)
            raise cls(problem["message"], remedy=problem["remedy"])
        near.setblocking(False)
        gaps = message["gaps"]
        assert isinstance(gaps, list)
        return LauncherProcess(
            process=process, sock=near, cgroup_kind=str(message["ready"]), gaps=tuple(gaps)
        )
    except TimeoutError:
        near.close()
        process.kill()
        process.wait()
        raise HostUnsupported(
            f"cannot start the launcher: no word from it within {START_SECONDS} s"
        ) from None
    except BaseException:
        near.close()
        process.wait()
        raise


@define(eq=False)
class _Waiting:
    """A request on its way."""

    answered: trio.Event = Factory(trio.Event)
    message: channel.Message | None = None
    descriptors: list[int] = Factory(list)


@define(eq=False)
class Link:
    """Requests to the launcher, and the ends of its jobs. Made by `open_link`."""

    _sock: trio.socket.SocketType
    _waiting: dict[int, _Waiting] = Factory(dict)
    _exits: dict[JobId, trio.MemorySendChannel[Exit]] = Factory(dict)
    _next: int = 1
    _sending: trio.StrictFIFOLock = Factory(trio.StrictFIFOLock)
    gone: trio.Event = Factory(trio.Event)
    """Set once the launcher has ended; no job of it is alive then."""

    async def spawn(
        self, job: JobId, order: Order, limits: Limits
    ) -> tuple[Started, trio.MemoryReceiveChannel[Exit]]:
        """Start a job; the channel gets its one `Exit`, or closes if the launcher goes.

        Raises SandboxError (or CommandNotFound, CommandNotExecutable) if a step of the start
        fails; then nothing of the job is left. Not to be cancelled: see `_ask`.
        """
        send, receive = trio.open_memory_channel[Exit](1)
        self._exits[job] = send
        try:
            message, descriptors = await self._ask(
                "spawn",
                job,
                arguments=list(order.arguments),
                environment=dict(order.environment),
                hostname=order.hostname,
                workdir=order.workdir,
                network=order.network,
                uid=order.uid,
                gid=order.gid,
                **limits._asdict(),
            )
        except BaseException:
            self._exits.pop(job, send).close()
            receive.close()
            raise
        stdout, stderr = descriptors
        pid = message["pid"]
        assert isinstance(pid, int)
        return Started(pid=pid, stdout=stdout, stderr=stderr), receive

    async def signal(self, job: JobId, number: signal.Signals) -> bool:
        """Send a signal to the job's first process; False if that has no handler for it."""
        message, _ = await self._ask("signal", job, signal=int(number))
        return message["delivered"] is True

    async def kill(self, job: JobId) -> None:
        """End every process of the job with SIGKILL; its `Exit` follows."""
        await self._ask("kill", job)

    async def remove(self, job: JobId) -> None:
        """Have the launcher forget a job, with its scope and files; a live one is killed."""
        await self._ask("remove", job)

    async def usage(self, job: JobId) -> Usage:
        """What the job has used so far."""
        message, _ = await self._ask("usage", job)
        return _usage(message)

    async def _ask(
        self, operation: str, job: JobId, **fields: object
    ) -> tuple[Mapping[str, object], list[int]]:
        """Send a request and wait for its reply.

        A request that went out has its effect, so whoever waits is shielded: the launcher
        answers every request or ends, and both wake the waiter.
        """
        if self.gone.is_set():
            raise _launcher_gone()
        number, self._next = self._next, self._next + 1
        waiting = self._waiting[number] = _Waiting()
        with trio.CancelScope(shield=True):
            await self._send({"id": number, "op": operation, "job": job, **fields})
            await waiting.answered.wait()
        if waiting.message is None:
            raise _launcher_gone()
        problem = waiting.message.get("error")
        if isinstance(problem, dict):
            raise explain(problem)
        ok = waiting.message["ok"]
        assert isinstance(ok, dict)
        return ok, waiting.descriptors

    async def _send(self, message: channel.Message) -> None:
        packet, ancillary, mine = channel.encode(message, ())
        try:
            async with self._sending:
                await self._sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)
        except OSError:
            await self.gone.wait()  # the reader sees the end of the stream too
        finally:
            channel.close_all(mine)

    async def serve(self) -> None:
        """Hand out what the launcher sends; returns once it is gone, everyone woken."""
        try:
            while True:
                packet, ancillary, flags, _ = await self._sock.recvmsg(
                    channel.PACKET_BYTES, channel.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
                if not packet:
                    return
                self._dispatch(*channel.decode(packet, ancillary, flags))
        except (OSError, JobworkerError):
            return  # reset: the same as its end
        finally:
            self.gone.set()
            for waiting in self._waiting.values():
                waiting.answered.set()
            self._waiting.clear()
            for exits in self._exits.values():
                exits.close()
            self._exits.clear()

    def _dispatch(self, message: channel.Message, descriptors: list[int]) -> None:
        if message.get("event") == "exit":
            channel.close_all(descriptors)
            job, code, number = message["job"], message["code"], message["signal"]
            usage = message["usage"]
            assert isinstance(job, int)
            assert isinstance(usage, dict)
            assert isinstance(code, int | None)
            assert isinstance(number, int | None)
            exits = self._exits.pop(JobId(job), None)
            if exits is not None:
                exits.send_nowait(Exit(code=code, signal=number, usage=_usage(usage)))
                exits.close()
            return
        answered = message.get("id")
        waiting = self._waiting.pop(answered, None) if isinstance(answered, int) else None
        if waiting is None:
            channel.close_all(descriptors)
            return
        waiting.message, waiting.descriptors = message, descriptors
        waiting.answered.set()


@asynccontextmanager
async def open_link(launcher: LauncherProcess) -> AsyncIterator[Link]:
    """Talk to a launcher; at exit its jobs end with it, and it is waited for."""
    sock = trio.socket.from_stdlib_socket(launcher.sock)
    link = Link(sock)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.serve)
            try:
                yield link
            finally:
                sock.shutdown(socket.SHUT_WR)
                with trio.CancelScope(shield=True):
                    await _reap(launcher.process)
                nursery.cancel_scope.cancel()
    finally:
        sock.close()


async def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for the launcher, which bounds its own farewell; kill it if it breaks its word."""
    with trio.move_on_after(20):
        await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
    if process.returncode is None:
        process.kill()


def _usage(message: Mapping[str, object]) -> Usage:
    numbers = {key: value for key, value in message.items() if isinstance(value, int)}
    numbers["processes"] = numbers.pop("pids")
    return Usage(**numbers)


def _launcher_gone() -> LauncherGone:
    return LauncherGone(
        "cannot serve the request: the launcher has ended", remedy="restart the service"
    )
