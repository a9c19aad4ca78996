"""A launcher that outlives services, played: its programs do what a test says.

Like the real one it keeps the jobs and their pipes while no service is there, gives up starts that
are under way when a service leaves, and keeps why a job was sent a signal. What one service has of
it is a `played_link`.
"""

import errno
import os
import signal
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import trio
from attrs import define, field

from jobworker.errors import JobworkerError, LauncherGone, OutOfDescriptors
from jobworker.model.job import JobId
from jobworker.sandbox.cgroup.accounting import Want
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.protocol.end_requests import TIMEOUT, EndRequest, EndRequestLog
from jobworker.sandbox.protocol.replies import Refusal
from jobworker.sandbox.service.exchange import SILENT_SECONDS
from jobworker.sandbox.service.launcher_refusals import explain

from .played_program import Behaviour, Program

Manner = Literal["answers", "refuses", "silent"]


class Service(Protocol):
    """A service that is told of ends."""

    def on_exit(self, program: Program) -> None:
        """Hear of the end of a program."""

    def close_exits(self) -> None:
        """Hear of no end any more."""

    def die(self) -> None:
        """Be gone with what moves in it."""


@define(eq=False)
class Held:
    """A request to the launcher, until it is answered."""

    effect: Callable[[], object]
    answered: trio.Event = field(factory=trio.Event)
    result: object = None
    fault: JobworkerError | None = None

    def serve(self) -> None:
        try:
            self.result = self.effect()
        except JobworkerError as error:
            self.fault = error
        self.answered.set()


@define(eq=False)
class Starting:
    """A start under way, until its program runs or it has failed."""

    decided: trio.Event = field(factory=trio.Event)
    fault: JobworkerError | None = None


@define(eq=False)
class KeptLauncher:
    """All programs of one launcher."""

    behaviours: Mapping[str, Behaviour]
    """By the name of the request, which is the program's first argument."""
    executed: list[Program]
    """Every program that any launcher has executed."""
    programs: dict[JobId, Program] = field(factory=dict)
    unstarted: set[JobId] = field(factory=set)
    gone: bool = False
    manner: Manner = "answers"
    _service: Service | None = None
    _held: list[Held] = field(factory=list)
    _silent_since: float = 0.0
    _starting: dict[JobId, tuple[Starting, str]] = field(factory=dict)

    def connect(self, service: Service) -> None:
        """Serve the next service."""
        self._service = service

    def disconnect(self, service: Service) -> None:
        """A service has gone: what it had sent has its effect, and starts are given up."""
        if self._service is not service:
            return  # it was killed, and the next one is there
        self._service = None
        self.behave("answers")
        for starting, _ in self._starting.values():
            starting.decided.set()
        self._starting.clear()

    def behave(self, manner: Manner) -> None:
        """Answer from now on, refuse for want of descriptors, or do nothing for a while."""
        if manner == "silent" and self.manner != "silent":
            self._silent_since = trio.current_time()
        self.manner = manner
        if manner != "silent":
            held, self._held = self._held, []
            for each in held:
                each.serve()

    def die(self) -> None:
        """Be gone, and all programs with it."""
        self.gone = True
        for program in list(self.programs.values()):
            program.lost = True
            self._forget(program)
        for starting, _ in self._starting.values():
            starting.fault = launcher_gone()
            starting.decided.set()
        for held in self._held:
            held.fault = launcher_gone()
            held.answered.set()
        self._starting.clear()
        self._held.clear()
        if self._service is not None:
            self._service.close_exits()

    @property
    def service(self) -> Service | None:
        """The service that is there."""
        return self._service

    @property
    def is_silent(self) -> bool:
        """Whether somebody waits and has heard nothing for too long."""
        since = trio.current_time() - self._silent_since
        return self.manner == "silent" and bool(self._held) and since >= SILENT_SECONDS

    def alive(self) -> list[Program]:
        """The programs that run."""
        return [each for each in self.programs.values() if each.exit is None]

    def hanging(self) -> list[JobId]:
        """The jobs whose starts are under way."""
        return list(self._starting)

    def end(self, program: Program, code: int | None, number: int | None, want: Want = "") -> None:
        """Have a program end, and tell the service."""
        program.end(code, number, want)
        held = Held(lambda: self._tell_exit(program))
        if self.manner == "silent":
            self._held.append(held)
        else:
            held.serve()

    def _tell_exit(self, program: Program) -> None:
        if self._service is not None:
            self._service.on_exit(program)

    def finish_start(self, job: JobId) -> None:
        """Have a start that hangs succeed."""
        starting, request = self._starting.pop(job)
        self._execute(job, request)
        starting.decided.set()

    def take(self, effect: Callable[[], object]) -> Held:
        """Take a request, and answer it unless this is silent."""
        held = Held(effect)
        if self.manner == "silent":
            self._held.append(held)
        else:
            held.serve()
        return held

    # --- requests ---------------------------------------------------------------------------

    def spawn(self, job: JobId, request: str) -> Starting:
        """Begin a start."""
        self._check_willing()
        assert job not in self.programs
        assert job not in self._starting
        self.unstarted.add(job)
        behaviour, starting = self.behaviours[request], Starting()
        how = behaviour.starts.pop(0) if behaviour.starts else "runs"
        if how == "refused":
            raise explain(Refusal("execute", errno.ENOENT, request))
        if how == "lacks processes":
            raise explain(Refusal("clone", errno.EAGAIN, ""))
        if how == "hangs":
            self._starting[job] = starting, request
            return starting
        self._execute(job, request)
        if how == "may have run":
            self.programs[job].may_only_have_run = True
            self.remove(job)
            starting.fault = OutOfDescriptors("no descriptor is left", data={"may_have_run": True})
        starting.decided.set()
        return starting

    def give_up(self, job: JobId) -> None:
        """Have a start fail that is under way."""
        if job in self._starting:
            starting, _ = self._starting.pop(job)
            starting.fault = explain(Refusal("start", errno.ECANCELED, "it was given up"))
            starting.decided.set()

    def signal(self, job: JobId, number: signal.Signals, ask: EndRequest) -> bool:
        """Send a signal: False where the program would not notice."""
        program = self._find(job)
        self._keep(program, ask, number)
        if program.on_signal == "exits" or number is signal.SIGKILL:
            self.end(program, None, number)
        return program.on_signal != "has no handler"

    def kill(self, job: JobId, ask: EndRequest) -> None:
        """Kill a program."""
        program = self._find(job)
        self._keep(program, ask, signal.SIGKILL)
        self.end(program, None, signal.SIGKILL)

    def remove(self, job: JobId) -> None:
        """Forget a job; one that is alive is killed."""
        self._check_willing()
        if job not in self.programs:
            raise no_such_job()
        self._forget(self.programs[job])

    def _check_willing(self) -> None:
        if self.manner == "refuses":
            raise explain(Refusal("request", errno.EMFILE, ""))

    def _find(self, job: JobId) -> Program:
        self._check_willing()
        program = self.programs.get(job)
        if program is None or program.exit is not None:
            raise no_such_job()
        return program

    def _keep(self, program: Program, ask: EndRequest, number: int) -> None:
        now = trio.current_time()
        if program.asked is None and ask.cause == TIMEOUT:
            limit = self.behaviours[program.request].timeout_seconds
            assert now - program.since >= limit - 0.01, "a time-out before its time"
        program.asked = program.asked or EndRequestLog(ask, now)
        program.asked.add(ask, number, now)

    def _execute(self, job: JobId, request: str) -> None:
        self.unstarted.discard(job)
        (out, out_write), (err, err_write) = (os.pipe2(os.O_NONBLOCK) for _ in range(2))
        on_signal = self.behaviours[request].on_signal
        program = Program(job, request, on_signal, (out, err), [out_write, err_write])
        self.programs[job] = program
        self.executed.append(program)

    def _forget(self, program: Program) -> None:
        close_all([*program.reads, *program.writes])
        program.writes = []
        del self.programs[program.job]


def launcher_gone() -> LauncherGone:
    return LauncherGone("cannot serve the request: the launcher has ended")


def no_such_job() -> JobworkerError:
    return explain(Refusal("job", errno.ESRCH, "no such job"))
