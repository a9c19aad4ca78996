"""The launcher's loop: requests of the service on one side, its children on the other.

    request   {"id", "op", "job", …}        reply  {"id", "ok": {…}} + descriptors
                                                   {"id", "error": {"step", "errno", "detail"}}
    event     {"event": "exit", "job", "code", "signal", "usage"}

When the service goes, its jobs go, and then the loop ends.

What must hold: the loop never waits for a child, for a file system that a job can slow down, or
for the service to read; a request that does not parse ends the connection, since only a
broken or hostile service sends one.

Standard library only.
"""

import errno
import socket
import time
from collections.abc import Mapping, Sequence

from jobworker.errors import JobworkerError, ProtocolError
from jobworker.sandbox import channel, requests
from jobworker.sandbox.children import Nursery
from jobworker.sandbox.launcher_jobs import Jobs, deliver, say
from jobworker.sandbox.outbox import Outbox
from jobworker.sandbox.turns import Turns

FAREWELL_SECONDS = 10.0
"""Bound on ending all jobs once the service is gone."""


class Launcher:
    """The loop, and the service's end of it."""

    def __init__(self, link: socket.socket, nursery: Nursery, spares: int) -> None:
        self._link = link
        self._turns = Turns()
        self._jobs = Jobs(self._turns, nursery, spares, self._send)
        self._outbox = Outbox(link)
        self._awaits_room = False
        self._leave_by: float | None = None

    def run(self) -> None:
        """Serve until the service is gone and no child is left."""
        self._turns.watch(self._link.fileno(), self._on_link)
        while not self._finished():
            self._turns.turn()

    def _finished(self) -> bool:
        if self._leave_by is None:
            return False
        return self._jobs.nothing_left or time.monotonic() > self._leave_by

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
        child = self._jobs.find(request.job)
        if isinstance(request, requests.Spawn):
            if child is not None:
                self._refuse(number, "job", errno.EEXIST, "the job's id is in use")
            elif request.order.network == "private":
                self._refuse(number, "network", errno.EOPNOTSUPP, "private")
            else:
                self._jobs.spawn(number, request)
        elif child is None:
            self._refuse(number, "job", errno.ESRCH, "no such job")
        elif isinstance(request, requests.Signal):
            self._reply(number, {"delivered": deliver(child, request.number)})
        elif isinstance(request, requests.Kill):
            self._jobs.kill(child)
            self._reply(number, {})
        elif isinstance(request, requests.UsageOf):
            self._reply(number, child.scope.usage()._asdict())
        else:
            self._jobs.remove(child)
            self._reply(number, {})

    def _reply(self, number: int, ok: Mapping[str, object]) -> None:
        self._send({"id": number, "ok": dict(ok)})

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
        if self._outbox.waiting != self._awaits_room:
            self._awaits_room = self._outbox.waiting
            self._turns.watch_room(self._link.fileno(), self._awaits_room)

    def _leave(self, reason: str) -> None:
        """End every job and then the loop: the service is gone or has lost its mind."""
        if reason:
            say(f"leaving: {reason}")
        self._leave_by = time.monotonic() + FAREWELL_SECONDS
        self._turns.call_in(FAREWELL_SECONDS, self._be_late)
        self._turns.unwatch(self._link.fileno())
        self._link.close()
        self._outbox.close()
        self._jobs.end_all()

    def _be_late(self) -> None:
        say("leaving, though not everything could be cleared away")
