"""The launcher's loop: serves the requests of the service and watches the children.

`sandbox.protocol.operations` has the table of requests and replies, `sandbox.protocol.events` that
of events. `Launcher` has the function of each operation.

A launcher runs in one of two ways. If a service has started it, it serves that service alone: when
the service goes, the launcher ends all jobs and then itself. If it runs on its own, it admits
services by its `LauncherListener`, and keeps jobs, pipes and exit statuses while no service is
connected; SIGTERM ends it. If a service goes during a start, the launcher gives the start up, and
tells the next service that the program was not executed, if that is certain.

What must hold: the loop never waits for a child, for a file system that a job can slow down, for
the kernel's locks on control groups, or for the service to read.

Standard library only.
"""

import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeVar, cast

from jobworker.errors import JobworkerError, SandboxError
from jobworker.sandbox import channel
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.disposal import Disposal
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.jobs import Jobs
from jobworker.sandbox.launcher.listener import LauncherListener
from jobworker.sandbox.launcher.reports import fault, job_entry, problem
from jobworker.sandbox.launcher.service_connection import ServiceConnection
from jobworker.sandbox.launcher.signals import deliver, keep_end_request
from jobworker.sandbox.launcher.starts import Starts
from jobworker.sandbox.log import BoundedLog, log_line
from jobworker.sandbox.protocol import operations as ops
from jobworker.sandbox.protocol import replies, requests
from jobworker.sandbox.protocol.version import PROTOCOL, mismatch

FAREWELL_SECONDS = 10.0
"""How long the launcher waits for the end of all jobs before it exits anyway."""
JOBS_PER_PAGE = channel.MAX_DESCRIPTORS // 2

Q = TypeVar("Q", bound=requests.Request)
A = TypeVar("A", bound=ops.Reply)
Function = Callable[[int, requests.Request], ops.Reply | None]


def _served(
    operation: ops.Operation[Q, A], function: Callable[[int, Q], A | None]
) -> tuple[str, Function]:
    """An entry of the launcher's table. The types ensure that function and operation match."""
    return operation.name, cast("Function", function)


class Launcher:
    """The loop, the connection to the service, and a function for each operation."""

    def __init__(self, pool: ChildPool, spares: int, hello: channel.Message, locks: int) -> None:
        self._event_loop, forks = pool.event_loop, pool.forks
        self._pool, self._volumes = pool, pool.volumes
        self._disposal = Disposal(self._event_loop, forks)
        self._makers = Chores(self._event_loop, forks, at_once=4, waiting=0)
        """Chores that make volumes. They are apart, since to format a large volume takes long."""
        self._chores = Chores(self._event_loop, forks, at_once=4, waiting=256)
        self._jobs = Jobs(pool)
        self._starts = Starts(pool, self._jobs, spares, self._send, locks)
        self._functions = self._table()
        self._hello = {**hello, "protocol": PROTOCOL}
        self._link: ServiceConnection | None = None
        self._greeted = False
        """Whether the service has sent its version, and the launcher accepts it."""
        self._listener: LauncherListener | None = None
        self._visits = BoundedLog()
        """The lines about services that come and go."""
        self._leave_by: float | None = None

    def serve_one(self, sock: socket.socket) -> None:
        """Serve the service at the other end of `sock`, and leave when it goes."""
        self._connect(sock)

    def serve_callers(self, listener: socket.socket, allowed_uids: Collection[int]) -> None:
        """Serve the services that connect and are allowed, one after the other, until SIGTERM."""
        self._leave_on_signals()
        self._listener = LauncherListener(
            listener,
            self._event_loop,
            self._disposal,
            allowed_uids=allowed_uids,
            occupied=lambda: self._link is not None,
            about_to_be_free=lambda: self._link is not None and self._link.is_at_its_end,
            admit=self._connect,
        )

    def run(self) -> None:
        """Run the loop until the launcher is to leave and no child is left.

        It returns at the latest `FAREWELL_SECONDS` after the launcher began to leave.
        """
        while not self._finished():
            self._event_loop.run_once()

    def _finished(self) -> bool:
        if self._leave_by is None:
            return False
        return self._jobs.nothing_left or time.monotonic() > self._leave_by

    def _leave_on_signals(self) -> None:
        # The kernel does not deliver a signal without a handler to PID 1 of a namespace.
        awake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

        def on_signal() -> None:
            self._leave(signal.Signals(os.read(awake, 64)[0]).name)

        self._event_loop.watch(awake, on_signal)

    # --- the service ------------------------------------------------------------------------

    def _connect(self, sock: socket.socket) -> None:
        self._greeted = False
        self._link = ServiceConnection(sock, self._event_loop, self._serve, self._on_lost)
        self._link.send(self._hello)

    def _on_lost(self, reason: str, descriptors: list[int]) -> None:
        self._link = None
        if self._listener is None:
            self._leave(reason)  # the descriptors stay open until the process exits
            return
        self._visits.line(f"the service has gone{': ' if reason else ''}{reason}", "INFO")
        self._starts.undo_all()
        self._listener.accept_waiting()
        self._disposal.add(descriptors)

    def _serve(self, number: int, request: requests.Request) -> None:
        operation = ops.operation_of(request)
        if not self._greeted and operation.name != ops.HELLO.name:
            self._refuse_version(number, mismatch(PROTOCOL, None))
            return
        try:
            reply = self._functions[operation.name](number, request)
            if reply is not None:
                self._reply(number, operation, reply)
        except (OSError, JobworkerError) as error:
            self._refuse(number, problem(operation.step, error))
        except Exception:  # noqa: BLE001 - recorded; without a reply the service waits for ever
            self._refuse(number, fault(self._event_loop.record(type(request).__name__)))

    def _table(self) -> dict[str, Function]:
        """The function of each operation: it gets the number of the request and the request.

        It returns the reply, or None where it refuses the request itself or replies later.
        """
        return dict(
            (
                _served(ops.HELLO, self._greet),
                _served(ops.PING, lambda *_: replies.Done()),
                _served(ops.SPAWN, self._spawn),
                _served(ops.PLAN, self._plan),
                _served(ops.GIVE_UP, self._give_up_start),
                _served(ops.SIGNAL, self._signal),
                _served(ops.KILL, self._kill),
                _served(ops.REMOVE, self._remove),
                _served(ops.USAGE, lambda _, asked: self._child(asked.job).usage()),
                _served(ops.LIST, self._list),
                _served(ops.TURNS, lambda *_: self._event_loop.take_times()),
                _served(ops.PROMISED, lambda *_: replies.Promised(self._jobs.promised_bytes())),
                _served(ops.MAKE_VOLUME, self._make_volume),
                _served(ops.REMOVE_VOLUME, self._remove_volume),
                _served(ops.LIST_VOLUMES, self._list_volumes),
            )
        )

    def _greet(self, number: int, asked: requests.Hello) -> replies.Done | None:
        why = mismatch(PROTOCOL, asked.protocol)
        if why:
            self._refuse_version(number, why)
            return None
        if self._listener is not None and not self._greeted:
            self._visits.line("a service has come", "INFO")
        self._greeted = True
        return replies.Done()

    def _refuse_version(self, number: int, why: str) -> None:
        self._refuse(number, {"step": "hello", "errno": errno.EPROTO, "detail": why})

    def _child(self, job: int) -> Child:
        """The child that is this job. Raises SandboxError if there is none."""
        child = self._jobs.find(job)
        if child is None:
            gone = {"step": "job", "errno": errno.ESRCH, "detail": "no such job"}
            raise SandboxError("no such job", data=gone)
        return child

    def _spawn(self, number: int, asked: requests.Spawn) -> None:
        self._starts.spawn(number, asked)

    def _plan(self, _: int, asked: requests.PlanOf) -> replies.Steps:
        return replies.Steps(tuple(self._pool.plan(asked.order, asked.limits)))

    def _give_up_start(self, _: int, asked: requests.GiveUpStart) -> replies.GivenUp:
        return replies.GivenUp(self._starts.give_up(asked.job))

    def _signal(self, _: int, asked: requests.Signal) -> replies.Delivered:
        child = self._child(asked.job)
        keep_end_request(child, asked.ask, asked.number)  # even if the signal cannot be sent
        delivered = deliver(child, asked.number)
        if not delivered:
            keep_end_request(child, asked.ask, asked.number, at_once=True)
        return replies.Delivered(delivered)

    def _kill(self, _: int, asked: requests.Kill) -> replies.Done:
        child = self._child(asked.job)
        keep_end_request(child, asked.ask, signal.SIGKILL, at_once=True)
        self._jobs.kill(child)
        return replies.Done()

    def _remove(self, number: int, asked: requests.Remove) -> None:
        child = self._child(asked.job)
        self._jobs.remove(child, partial(self._reply, number, ops.REMOVE, replies.Done()))

    def _make_volume(self, number: int, asked: requests.MakeVolume) -> None:
        done = partial(self._on_volume, self._link, number)
        self._volumes.make(self._makers, asked.name, asked.size, done, thin=asked.thin)

    def _remove_volume(self, number: int, asked: requests.RemoveVolume) -> None:
        done = partial(self._on_volume, self._link, number)
        self._volumes.remove(self._chores, asked.name, done)

    def _list_volumes(self, number: int, _: requests.ListVolumes) -> None:
        self._volumes.list(self._chores, partial(self._on_volume, self._link, number))

    def _on_volume(
        self, asker: ServiceConnection | None, number: int, outcome: channel.Message
    ) -> None:
        """Answer a request with the outcome of its chore: the members of the reply, or an error."""
        if asker is not self._link:  # the service that asked has gone
            return
        if "errno" in outcome:
            self._refuse(number, outcome)
        else:
            self._send({"id": number, "ok": outcome})

    def _list(self, number: int, asked: requests.ListJobs) -> None:
        started = self._jobs.started_after(asked.after)
        page = started[:JOBS_PER_PAGE]
        pipes = [pipe for child in page for pipe in (child.stdout, child.stderr)]
        more = len(started) > len(page)
        unstarted = () if more else tuple(self._jobs.unstarted)
        reply = replies.JobEntries(tuple(map(job_entry, page)), more, unstarted)
        self._reply(number, ops.LIST, reply, pipes)

    def _reply(
        self,
        number: int,
        operation: ops.Operation[Q, A],
        reply: A,
        descriptors: Sequence[int] = (),
    ) -> None:
        self._send({"id": number, **ops.answer(operation, reply)}, descriptors)

    def _refuse(self, number: int, error: channel.Message) -> None:
        self._send({"id": number, "error": error})

    def _send(self, message: channel.Message, descriptors: Sequence[int] = ()) -> None:
        if self._link is not None:
            self._link.send(message, descriptors)

    def _leave(self, reason: str) -> None:
        """Begin to leave: end every job, and let `run` return after that."""
        if self._leave_by is not None:
            return
        if reason:
            killed = sum(child.exit is None for child in self._jobs.started_after(0))
            log_line(f"leaving: {reason}{f'; jobs killed: {killed}' if killed else ''}", "INFO")
        self._leave_by = time.monotonic() + FAREWELL_SECONDS
        self._event_loop.call_later(FAREWELL_SECONDS, self._be_late)
        if self._link is not None:
            self._link.mute()
        if self._listener is not None:
            self._listener.close()
        self._starts.close()
        self._jobs.remove_all()

    def _be_late(self) -> None:
        log_line("leaving, though not everything could be cleared away")
