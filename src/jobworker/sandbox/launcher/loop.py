"""The launcher's loop: requests of the service on one side, its children on the other.

    request   {"id", "op", "job", …}        reply  {"id", "ok": {…}} + descriptors
                                                   {"id", "error": {"step", "errno", "detail"}}
    event     {"event": "exit", "job", "code", "signal", "usage", …}
              {"event": "network_ended", "job", "why"}

A launcher has one of two lives. One that a service has started serves that service: when it
goes, its jobs go, and then the loop ends. One that runs on its own lets services in by its
`Doorway` and keeps jobs, pipes and exit statuses while none is there; SIGTERM ends it. A start
that nobody waits for any more, since the service went in the midst of it, is undone, and the next
service is told that the program was not executed, where that is sure.

What must hold: the loop never waits for a child, for a file system that a job can slow down, or
for the service to read.

Standard library only.
"""

import errno
import os
import signal
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from jobworker.errors import JobworkerError
from jobworker.sandbox import channel
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.disposal import Disposal
from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.launcher.children import Nursery
from jobworker.sandbox.launcher.jobs import Jobs, deliver, fault, keep_ask, listed, problem
from jobworker.sandbox.launcher.listener import Doorway
from jobworker.sandbox.launcher.service_connection import ServiceLink
from jobworker.sandbox.log import say
from jobworker.sandbox.protocol import requests
from jobworker.sandbox.protocol.version import PROTOCOL, mismatch

FAREWELL_SECONDS = 10.0
"""Bound on ending all jobs once the launcher is to leave."""
JOBS_PER_PAGE = channel.MAX_DESCRIPTORS // 2


class Launcher:
    """The loop, and who is connected to it."""

    def __init__(self, nursery: Nursery, spares: int, hello: channel.Message, locks: int) -> None:
        self._turns = Turns()
        self._volumes = nursery.volumes
        self._disposal = Disposal(self._turns)
        self._makers = Chores(self._turns, at_once=4, waiting=0)
        """Apart from the rest, since formatting a large volume takes long."""
        self._chores = Chores(self._turns, at_once=4, waiting=256)
        self._jobs = Jobs(self._turns, nursery, spares, self._send, locks)
        self._hello = {**hello, "protocol": PROTOCOL}
        self._link: ServiceLink | None = None
        self._greeted = False
        """Whether the service has told its version."""
        self._doorway: Doorway | None = None
        self._leave_by: float | None = None

    def serve_one(self, sock: socket.socket) -> None:
        """Serve the service at the other end, and live as long as it does."""
        self._connect(sock)

    def serve_callers(self, listener: socket.socket, allowed_uids: Collection[int]) -> None:
        """Serve whoever calls and may, one after the other, until SIGTERM."""
        self._leave_on_signals()
        self._doorway = Doorway(
            listener,
            self._turns,
            self._disposal,
            allowed_uids=allowed_uids,
            occupied=lambda: self._link is not None,
            about_to_be_free=lambda: self._link is not None and self._link.is_at_its_end,
            admit=self._connect,
        )

    def run(self) -> None:
        """Do all that, until it is time to leave and no child is left."""
        while not self._finished():
            self._turns.turn()

    def _finished(self) -> bool:
        if self._leave_by is None:
            return False
        return self._jobs.nothing_left or time.monotonic() > self._leave_by

    def _leave_on_signals(self) -> None:
        # A signal that has no handler would not reach PID 1 of a namespace at all.
        awake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

        def on_signal() -> None:
            self._leave(signal.Signals(os.read(awake, 64)[0]).name)

        self._turns.watch(awake, on_signal)

    # --- the service ------------------------------------------------------------------------

    def _connect(self, sock: socket.socket) -> None:
        self._greeted = False
        self._link = ServiceLink(sock, self._turns, self._serve, self._on_lost)
        self._link.send(self._hello)

    def _on_lost(self, reason: str, descriptors: list[int]) -> None:
        self._link = None
        if self._doorway is None:
            self._leave(reason)  # the descriptors are left open: they end with the process
            return
        say(f"the service has gone{': ' if reason else ''}{reason}", "INFO")
        self._jobs.undo_starts()
        self._doorway.go_on()
        self._disposal.take(descriptors)

    def _serve(self, number: int, request: requests.Request) -> None:
        try:
            if isinstance(request, requests.Hello):
                self._greet(number, request.protocol)
            elif not self._greeted:
                self._refuse_version(number, mismatch(PROTOCOL, None))
            elif isinstance(request, requests.OfAJob):
                self._do_for_job(number, request)
            elif isinstance(request, requests.VolumeRequest):
                self._do_volume(number, request)
            else:
                self._tell(number, request)
        except (OSError, JobworkerError) as error:
            step = "spawn" if isinstance(request, requests.Spawn) else "request"
            self._refuse(number, problem(step, error))
        except Exception:  # noqa: BLE001 - recorded; its sender would wait for ever
            self._refuse(number, fault(self._turns.record(type(request).__name__)))

    def _greet(self, number: int, protocol: int) -> None:
        why = mismatch(PROTOCOL, protocol)
        if why:
            self._refuse_version(number, why)
            return
        self._greeted = True
        if self._doorway is not None:
            say("a service has come", "INFO")
        self._reply(number, {})

    def _refuse_version(self, number: int, why: str) -> None:
        self._refuse(number, {"step": "hello", "errno": errno.EPROTO, "detail": why})

    def _tell(self, number: int, request: requests.Question) -> None:
        if isinstance(request, requests.ListJobs):
            self._list(number, request.after)
        elif isinstance(request, requests.PlanOf):
            self._reply(number, {"steps": self._jobs.plan(request)})
        elif isinstance(request, requests.TimesOfTurns):
            self._reply(number, self._turns.take_times()._asdict())
        elif isinstance(request, requests.PromisedBytes):
            self._reply(number, {"bytes": self._jobs.promised_bytes()})
        else:
            self._reply(number, {})

    def _do_for_job(self, number: int, request: requests.OfAJob) -> None:
        if isinstance(request, requests.Spawn):
            self._jobs.spawn(number, request)
            return
        if isinstance(request, requests.GiveUpStart):
            self._reply(number, {"given_up": self._jobs.give_up_start(request.job)})
            return
        child = self._jobs.find(request.job)
        if child is None:
            gone: channel.Message = {"step": "job", "errno": errno.ESRCH, "detail": "no such job"}
            self._refuse(number, gone)
        elif isinstance(request, requests.Signal):
            keep_ask(child, request.ask, request.number)  # whatever becomes of the signal
            delivered = deliver(child, request.number)
            if not delivered:
                keep_ask(child, request.ask, request.number, at_once=True)
            self._reply(number, {"delivered": delivered})
        elif isinstance(request, requests.Kill):
            keep_ask(child, request.ask, signal.SIGKILL, at_once=True)
            self._jobs.kill(child)
            self._reply(number, {})
        elif isinstance(request, requests.UsageOf):
            self._reply(number, child.usage()._asdict())
        else:
            self._jobs.remove(child, partial(self._reply, number, {}))

    def _do_volume(self, number: int, request: requests.VolumeRequest) -> None:
        done = partial(self._on_volume, self._link, number)
        if isinstance(request, requests.ListVolumes):
            self._volumes.list(self._chores, done)
        elif isinstance(request, requests.RemoveVolume):
            self._volumes.remove(self._chores, request.name, done)
        else:
            self._volumes.make(self._makers, request.name, request.size, done, thin=request.thin)

    def _on_volume(self, asker: ServiceLink | None, number: int, outcome: channel.Message) -> None:
        if asker is not self._link:  # whoever asked has gone
            return
        if "errno" in outcome:
            self._send({"id": number, "error": outcome})
        else:
            self._reply(number, outcome)

    def _list(self, number: int, after: int) -> None:
        started = self._jobs.started_after(after)
        page = started[:JOBS_PER_PAGE]
        pipes = [pipe for child in page for pipe in (child.stdout, child.stderr)]
        more = len(started) > len(page)
        jobs = [listed(child) for child in page]
        unstarted = [] if more else self._jobs.unstarted
        self._reply(number, {"jobs": jobs, "more": more, "unstarted": unstarted}, pipes)

    def _reply(
        self, number: int, ok: Mapping[str, object], descriptors: Sequence[int] = ()
    ) -> None:
        self._send({"id": number, "ok": dict(ok)}, descriptors)

    def _refuse(self, number: int, error: channel.Message) -> None:
        self._send({"id": number, "error": error})

    def _send(self, message: channel.Message, descriptors: Sequence[int] = ()) -> None:
        if self._link is not None:
            self._link.send(message, descriptors)

    def _leave(self, reason: str) -> None:
        """End every job and then the loop."""
        if self._leave_by is not None:
            return
        if reason:
            killed = sum(child.exit is None for child in self._jobs.started_after(0))
            say(f"leaving: {reason}{f'; jobs killed: {killed}' if killed else ''}", "INFO")
        self._leave_by = time.monotonic() + FAREWELL_SECONDS
        self._turns.call_in(FAREWELL_SECONDS, self._be_late)
        if self._link is not None:
            self._link.mute()
        if self._doorway is not None:
            self._doorway.close()
        self._jobs.end_all()

    def _be_late(self) -> None:
        say("leaving, though not everything could be cleared away")
