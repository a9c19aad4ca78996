"""The launcher's loop: requests of the service on one side, children on the other.

    request   {"id", "op", "job", …}        reply  {"id", "ok": {…}} + descriptors
                                                   {"id", "error": {"step", "errno", "detail"}}
    event     {"event": "exit", "job", "code", "signal", "usage"}

It keeps spares ready, turns them into jobs, holds the read ends of their pipes and their exit
status, kills, reaps and clears away. When the service goes, its jobs go, and then the loop ends.

What must hold: the loop never waits for a child, for a file system that a job can slow down, or
for the service to read; a request that does not parse ends the connection, since only a
broken or hostile service sends one.

Standard library only.
"""

import contextlib
import errno
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from jobworker.errors import JobworkerError, ProtocolError
from jobworker.sandbox import channel, requests
from jobworker.sandbox.cgroups import Usage
from jobworker.sandbox.child import order_message
from jobworker.sandbox.children import Child, Nursery, reap
from jobworker.sandbox.outbox import Outbox

REFILL_SECONDS = 0.02
"""A spare is made this long after one was taken: at once would slow the start that took it."""
FAREWELL_SECONDS = 10.0
"""Bound on ending all jobs once the service is gone."""
OOM_SECONDS = 0.1
OOM_LOOK_SECONDS = 0.002
CLEAR_AGAIN_SECONDS = 0.02
_DIED: channel.Message = {"step": "prepare", "errno": 0, "detail": "the process ended"}

_TOO_LITTLE_MEMORY: channel.Message = {
    "step": "limits",
    "errno": errno.ENOMEM,
    "detail": "the memory limit leaves no room for a start",
}

_Source = Callable[[], None]


class Launcher:
    """The loop and its state."""

    def __init__(self, link: socket.socket, nursery: Nursery, spares: int) -> None:
        self._link, self._nursery, self._wanted_spares = link, nursery, spares
        self._poll = select.epoll()
        self._sources: dict[int, _Source] = {}
        self._children: set[Child] = set()
        self._spares: deque[Child] = deque()
        self._jobs: dict[int, Child] = {}
        self._outbox = Outbox(link)
        self._link_events = select.EPOLLIN
        self._refill_at: float | None = time.monotonic()
        self._leave_by: float | None = None
        self._uncleared: set[Child] = set()
        """Ended children whose scope could not be removed yet; tried again."""
        self._suspects: dict[Child, float] = {}
        """Children whose scope told of an OOM, and until when to look for the kill."""

    def run(self) -> None:
        """Serve until the service is gone and no child is left."""
        self._watch(self._link.fileno(), self._on_link)
        self._watch_sweepers()
        while not self._finished():
            for descriptor, _ in self._poll.poll(self._patience()):
                # A source may have been closed by one before it in the same turn.
                source = self._sources.get(descriptor)
                if source is not None:
                    source()
            for child in list(self._uncleared):
                self._clear(child)
            if self._suspects:
                self._look_at_suspects()
            if self._refill_at is not None and time.monotonic() >= self._refill_at:
                self._refill()

    def _finished(self) -> bool:
        if self._leave_by is None:
            return False
        idle = not self._children and not self._nursery.sweepers
        return idle or time.monotonic() > self._leave_by

    def _patience(self) -> float | None:
        moments = [at for at in (self._refill_at, self._leave_by) if at is not None]
        if self._suspects:
            moments.append(time.monotonic() + OOM_LOOK_SECONDS)
        if self._uncleared:
            moments.append(time.monotonic() + CLEAR_AGAIN_SECONDS)
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _watch(self, descriptor: int, source: _Source) -> None:
        self._sources[descriptor] = source
        self._poll.register(descriptor, select.EPOLLIN)

    def _unwatch(self, descriptor: int) -> None:
        if self._sources.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    # --- the service ------------------------------------------------------------------------

    def _on_link(self) -> None:
        try:
            self._outbox.flush()
            self._await_room()
            received = channel.receive(self._link)
            if received is None:
                self._leave("")
                return
            message, descriptors = received
            if descriptors:  # left open, see `channel.decode`
                raise ProtocolError("cannot take the request: it carries descriptors")
            number, request = requests.parse(message)
        except BlockingIOError:
            return
        except (ProtocolError, OSError) as error:
            self._leave(str(error))
            return
        try:
            self._serve(number, request)
        except OSError as error:
            self._refuse(number, type(request).__name__.lower(), error.errno or 0, str(error))
        except JobworkerError as error:
            self._refuse(number, str(error.data.get("step", "limits")), 0, error.message)

    def _serve(self, number: int, request: requests.Request) -> None:
        if isinstance(request, requests.Spawn):
            self._spawn(number, request)
            return
        child = self._jobs.get(request.job)
        if child is None:
            self._refuse(number, "job", errno.ESRCH, "no such job")
        elif isinstance(request, requests.Signal):
            self._reply(number, {"delivered": _deliver(child, request.number)})
        elif isinstance(request, requests.Kill):
            self._kill(child)
            self._reply(number, {})
        elif isinstance(request, requests.UsageOf):
            self._reply(number, child.scope.usage()._asdict())
        else:
            self._remove(child)
            self._reply(number, {})

    def _spawn(self, number: int, request: requests.Spawn) -> None:
        if request.job in self._jobs:
            self._refuse(number, "job", errno.EEXIST, "the job's id is in use")
            return
        if self._refill_at is None:
            self._refill_at = time.monotonic() + REFILL_SECONDS
        while self._spares:
            spare = self._spares.popleft()
            try:
                self._order(spare, number, request)
                return
            except OSError as error:  # it has died while it waited
                print(f"launcher: a spare is lost: {error}", file=sys.stderr, flush=True)  # noqa: T201
        self._order(self._make(), number, request)

    def _order(self, child: Child, number: int, request: requests.Spawn) -> None:
        """Have a child become the job; if it cannot, it is reaped and cleared like any other."""
        try:
            child.scope.arm(request.limits)
            if child.sock is None:
                raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
            channel.send(child.sock, order_message(request.order))
        except (OSError, JobworkerError):
            self._kill(child)
            raise
        self._jobs[request.job] = child
        child.job, child.request = request.job, number

    def _reply(
        self, number: int, ok: Mapping[str, object], descriptors: Sequence[int] = ()
    ) -> None:
        self._send({"id": number, "ok": dict(ok)}, descriptors)

    def _refuse(self, number: int, step: str, code: int, detail: str) -> None:
        self._send({"id": number, "error": {"step": step, "errno": code, "detail": detail}})

    def _send(self, message: channel.Message, descriptors: Sequence[int] = ()) -> None:
        if self._leave_by is not None:
            return
        try:
            self._outbox.send(message, descriptors)
        except OSError as error:
            self._leave(str(error))
            return
        self._await_room()

    def _await_room(self) -> None:
        """Be woken when there is room again for what waits to be sent."""
        wanted = select.EPOLLIN | (select.EPOLLOUT if self._outbox.waiting else 0)
        if wanted != self._link_events:
            self._link_events = wanted
            self._poll.modify(self._link.fileno(), wanted)

    def _leave(self, reason: str) -> None:
        """End every job and then the loop: the service is gone or has lost its mind."""
        if reason:
            print(f"launcher: leaving: {reason}", file=sys.stderr, flush=True)  # noqa: T201
        self._leave_by = time.monotonic() + FAREWELL_SECONDS
        self._refill_at = None
        self._unwatch(self._link.fileno())
        self._link.close()
        self._outbox.close()
        for child in list(self._children):
            self._remove(child)

    # --- children ---------------------------------------------------------------------------

    def _make(self) -> Child:
        child = self._nursery.make()
        assert child.sock is not None
        self._children.add(child)
        self._watch(child.sock.fileno(), lambda: self._on_child(child))
        self._watch(child.pidfd, lambda: self._on_exit(child))
        if child.scope.oom_fd is not None:
            self._watch(child.scope.oom_fd, lambda: self._on_oom(child))
        return child

    def _refill(self) -> None:
        """Make one spare; more follow in later turns, so that requests are served between."""
        self._refill_at = None
        if len(self._spares) >= self._wanted_spares or not self._nursery.has_room():
            return
        try:
            self._spares.append(self._make())
            self._refill_at = time.monotonic()
        except (OSError, JobworkerError) as error:
            # The next request tries again and has the reason told to who asked.
            print(f"launcher: cannot keep a spare: {error}", file=sys.stderr, flush=True)  # noqa: T201

    def _on_child(self, child: Child) -> None:
        """A child has spoken, or has executed its program, or is gone."""
        assert child.sock is not None
        try:
            while (received := channel.receive(child.sock)) is not None:
                message, descriptors = received
                channel.close_all(descriptors)
                failure = message.get("failed")
                if isinstance(failure, dict):
                    child.failure = failure
        except BlockingIOError:
            if child.exit is None:
                return
        except (ProtocolError, OSError):  # a reset: it died with its order unread
            child.failure = child.failure or _DIED
        self._unwatch(child.sock.fileno())
        child.sock.close()
        child.sock = None
        if child in self._spares:
            self._spares.remove(child)
        if child.failure is None and child.job is not None and child.request is not None:
            started = {"pid": child.pid}
            self._reply(child.request, started, (child.stdout, child.stderr))
            child.request = None

    def _on_exit(self, child: Child) -> None:
        self._unwatch(child.pidfd)
        child.exit = reap(child)
        if child.sock is not None:  # its last words come before its end
            self._on_child(child)
        if child.request is not None:  # the start failed: tell once nothing of it is left
            number, failure = child.request, child.failure or _DIED
            if _usage(child).oom_kills:
                failure = _TOO_LITTLE_MEMORY
            self._clear(child)
            self._send({"id": number, "error": failure})
        elif child.job is None or self._leave_by is not None:
            if child.failure is not None:
                print(f"launcher: a spare failed: {child.failure}", file=sys.stderr, flush=True)  # noqa: T201
            self._clear(child)
        else:
            usage = _usage(child)._asdict()
            code, number_of_signal = child.exit
            self._send(
                {
                    "event": "exit",
                    "job": child.job,
                    "code": code,
                    "signal": number_of_signal,
                    "usage": usage,
                }
            )

    def _on_oom(self, child: Child) -> None:
        """v1 kills one process of the group; a job over its limit is to end as a whole.

        The event comes up to some milliseconds before the kill is counted, and also for a group
        above, where nothing of this job is killed. So the count is looked at for a while.
        """
        child.scope.clear_oom()
        self._suspects[child] = time.monotonic() + OOM_SECONDS

    def _look_at_suspects(self) -> None:
        now = time.monotonic()
        for child, until in list(self._suspects.items()):
            killed = child.exit is None and _usage(child).oom_kills > 0
            if killed:
                self._kill(child)
            if killed or child.exit is not None or now > until:
                del self._suspects[child]

    def _kill(self, child: Child) -> None:
        if child.exit is None:
            # The first process takes its namespace along; the scope catches what is still on
            # its way there.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            with contextlib.suppress(OSError):
                child.scope.kill()

    def _remove(self, child: Child) -> None:
        if child.exit is None:  # it is cleared away when it has ended
            self._forget_job(child)
            self._kill(child)
        else:
            self._clear(child)

    def _clear(self, child: Child) -> None:
        if child not in self._children:
            return
        if child.scope.oom_fd is not None:
            self._unwatch(child.scope.oom_fd)
        self._suspects.pop(child, None)
        self._forget_job(child)
        try:
            self._nursery.clear(child)
        except OSError:
            # The kernel is still busy with the last of its processes.
            self._uncleared.add(child)
            return
        self._uncleared.discard(child)
        self._children.discard(child)
        self._watch_sweepers()

    def _forget_job(self, child: Child) -> None:
        if child.job is not None:
            self._jobs.pop(child.job, None)
            child.job = None

    def _watch_sweepers(self) -> None:
        for pidfd in self._nursery.sweepers.keys() - self._sources.keys():
            self._watch(pidfd, partial(self._on_sweeper, pidfd))

    def _on_sweeper(self, pidfd: int) -> None:
        self._unwatch(pidfd)
        self._nursery.reap_sweeper(pidfd)
        self._watch_sweepers()


def _usage(child: Child) -> Usage:
    """What an ended child has used; nothing where the kernel does not tell."""
    try:
        return child.scope.usage()
    except OSError as error:
        print(f"launcher: cannot read {child.slot.name}'s usage: {error}", file=sys.stderr)  # noqa: T201
        return Usage()


def _deliver(child: Child, number: int) -> bool:
    """Send a signal to a job's first process; False if that would have no effect of any kind.

    PID 1 of a namespace is spared every signal that it has no handler for
    (pid_namespaces(7)), where another process would end by the signal's default action. One
    that ignores the signal on purpose has said something, and gets its grace period. The masks
    in proc(5) tell: SigCgt and SigIgn.
    """
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        with open(f"/proc/{child.pid}/status") as status:
            masks = [line.split()[1] for line in status if line.startswith(("SigCgt:", "SigIgn:"))]
        if not any(int(mask, 16) >> (number - 1) & 1 for mask in masks):
            return False
    signal.pidfd_send_signal(child.pidfd, number)
    return True
