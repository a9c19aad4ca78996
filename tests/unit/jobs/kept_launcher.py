"""A launcher that outlives services, played: its programs are pipes, and do what a test says.

Like the real one it keeps the jobs and their pipes while no service is there, gives up starts that
are under way when a service leaves, and keeps why a job was sent a signal. `ServiceLink` is what
one service has of it, in place of `sandbox.service.link.Link`.
"""

import errno
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal

import trio
from attrs import define, field

from jobworker.errors import JobworkerError, LauncherGone, LauncherSilent, OutOfDescriptors
from jobworker.model.job import JobId, Usage
from jobworker.sandbox.cgroup.scope import Want
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.protocol.asks import Ask, Asked
from jobworker.sandbox.protocol.replies import Refusal
from jobworker.sandbox.service.exchange import LOOK_SECONDS, SILENT_SECONDS, Waitable
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.service.jobs_told import AskedBefore, Exit
from jobworker.sandbox.service.launcher_errors import launcher_silent
from jobworker.sandbox.service.start_failures import explain
from jobworker.sandbox.start.plan import Order

Start = Literal["runs", "refused", "lacks processes", "hangs", "may have run"]
OnSignal = Literal["exits", "goes on", "has no handler"]
Manner = Literal["answers", "refuses", "silent"]


@define(kw_only=True)
class Behaviour:
    """What the program of one request does."""

    starts: list[Start]
    """How its starts go, in turn; further ones succeed."""
    on_signal: OnSignal


@define(eq=False)
class Program:
    """A job whose program was executed."""

    job: JobId
    request: str
    on_signal: OnSignal
    reads: tuple[int, int]
    writes: list[int]
    since: float = field(factory=trio.current_time)
    wrote: tuple[bytearray, bytearray] = field(factory=lambda: (bytearray(), bytearray()))
    asked: Asked | None = None
    exit: Exit | None = None
    cause: str = ""
    """Why it was asked to end, where that was before its end."""
    lost: bool = False
    """Whether its launcher died before it was told to forget it."""
    may_only_have_run: bool = False
    """Whether the service could not take its pipes, and had it removed."""

    def write(self, stream: int, count: int) -> None:
        """Write `count` bytes, each of which tells its place, or what the pipe has room for."""
        begin = len(self.wrote[stream])
        data = bytes(place % 251 for place in range(begin, begin + count))
        try:
            written = os.write(self.writes[stream], data)
        except BlockingIOError:
            return
        self.wrote[stream].extend(data[:written])

    def end(self, code: int | None, number: int | None, want: Want) -> None:
        """Be gone, with all that could write to the pipes."""
        close_all(self.writes)
        self.writes = []
        self.cause = self.asked.cause if self.asked else ""
        self.exit = Exit(code=code, signal=number, usage=Usage(), want=want)


@define(eq=False)
class _Held:
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
class _Starting:
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
    _link: "ServiceLink | None" = None
    _held: list[_Held] = field(factory=list)
    _silent_since: float = 0.0
    _starting: dict[JobId, tuple[_Starting, str]] = field(factory=dict)

    def connect(self) -> "ServiceLink":
        """Serve the next service, which takes over what there is."""
        link = ServiceLink(self, unstarted=frozenset(self.unstarted))
        link.inherited = {job: link.expect(each) for job, each in sorted(self.programs.items())}
        self._link = link
        return link

    def disconnect(self) -> None:
        """The service has gone: what it had sent has its effect, and starts are given up."""
        self._link = None
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
            starting.fault = _gone()
            starting.decided.set()
        for held in self._held:
            held.fault = _gone()
            held.answered.set()
        self._starting.clear()
        self._held.clear()
        if self._link is not None:
            self._link.close_exits()

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
        held = _Held(lambda: self._tell_exit(program))
        if self.manner == "silent":
            self._held.append(held)
        else:
            held.serve()

    def _tell_exit(self, program: Program) -> None:
        if self._link is not None:
            self._link.on_exit(program)

    def finish_start(self, job: JobId) -> None:
        """Have a start that hangs succeed."""
        starting, request = self._starting.pop(job)
        self._execute(job, request)
        starting.decided.set()

    def take(self, effect: Callable[[], object]) -> _Held:
        """Take a request, and answer it unless this is silent."""
        held = _Held(effect)
        if self.manner == "silent":
            self._held.append(held)
        else:
            held.serve()
        return held

    # --- requests ---------------------------------------------------------------------------

    def spawn(self, job: JobId, request: str) -> _Starting:
        """Begin a start."""
        self._check_willing()
        assert job not in self.programs
        assert job not in self._starting
        self.unstarted.add(job)
        behaviour, starting = self.behaviours[request], _Starting()
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

    def signal(self, job: JobId, number: signal.Signals, ask: Ask) -> bool:
        """Send a signal: False where the program would not notice."""
        program = self._find(job)
        self._keep(program, ask, number)
        if program.on_signal == "exits" or number is signal.SIGKILL:
            self.end(program, None, number)
        return program.on_signal != "has no handler"

    def kill(self, job: JobId, ask: Ask) -> None:
        """Kill a program."""
        program = self._find(job)
        self._keep(program, ask, signal.SIGKILL)
        self.end(program, None, signal.SIGKILL)

    def remove(self, job: JobId) -> None:
        """Forget a job; one that is alive is killed."""
        self._check_willing()
        if job not in self.programs:
            raise _no_such_job()
        self._forget(self.programs[job])

    def _check_willing(self) -> None:
        if self.manner == "refuses":
            raise explain(Refusal("request", errno.EMFILE, ""))

    def _find(self, job: JobId) -> Program:
        self._check_willing()
        program = self.programs.get(job)
        if program is None or program.exit is not None:
            raise _no_such_job()
        return program

    def _keep(self, program: Program, ask: Ask, number: int) -> None:
        now = trio.current_time()
        program.asked = program.asked or Asked(ask, now)
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


@define(eq=False)
class ServiceLink:
    """One service's requests to the launcher."""

    _launcher: KeptLauncher
    unstarted: frozenset[JobId] = field(kw_only=True)
    inherited: dict[JobId, tuple[Started, Exits]] = field(factory=dict, init=False)
    keeps_asks: bool = field(default=True, init=False)
    _given_up: trio.Event = field(factory=trio.Event, init=False)
    _exits: dict[JobId, trio.MemorySendChannel[Exit]] = field(factory=dict, init=False)

    @property
    def silent(self) -> bool:
        """Whether the launcher is there and has not answered for a while."""
        return self._launcher.is_silent and not self._given_up.is_set()

    def expect(self, program: Program) -> tuple[Started, Exits]:
        """What a service gets of a program, and where it hears of its end."""
        send, receive = trio.open_memory_channel[Exit](1)
        self._exits[program.job] = send
        if program.exit is not None:
            self.on_exit(program)
        stdout, stderr = map(os.dup, program.reads)
        started = Started(
            pid=1, stdout=stdout, stderr=stderr, since=program.since, asked=_told(program.asked)
        )
        return started, receive

    def on_exit(self, program: Program) -> None:
        """Tell of the end of a program, if anybody waits for it."""
        send = self._exits.pop(program.job, None)
        if send is not None and program.exit is not None:
            with suppress(trio.BrokenResourceError):  # nobody wants to know any more
                send.send_nowait(program.exit)
            send.close()

    def close_exits(self) -> None:
        """Tell of no end any more."""
        for send in self._exits.values():
            send.close()
        self._exits.clear()

    def give_up(self) -> None:
        """Ask nothing more; no request waits longer."""
        self._given_up.set()
        self.close_exits()

    async def spawn(self, job: JobId, order: Order, _limits: object) -> tuple[Started, Exits]:
        """Start a job."""
        starting = await self._ask(lambda: self._launcher.spawn(job, order.arguments[0]))
        assert isinstance(starting, _Starting)
        await self._wait(starting.decided)
        if starting.fault is not None:
            raise starting.fault
        return self.expect(self._launcher.programs[job])

    async def signal(self, job: JobId, number: signal.Signals, ask: Ask) -> bool:
        """Send a signal."""
        return bool(await self._ask(lambda: self._launcher.signal(job, number, ask)))

    async def kill(self, job: JobId, ask: Ask) -> None:
        """Kill a job."""
        await self._ask(lambda: self._launcher.kill(job, ask))

    async def give_up_start(self, job: JobId) -> None:
        """Have a start under way fail."""
        await self._ask(lambda: self._launcher.give_up(job))

    async def remove(self, job: JobId) -> None:
        """Have the launcher forget a job."""
        await self._ask(lambda: self._launcher.remove(job))

    async def begin_to_remove(self, job: JobId) -> None:
        """The same, and wait for nothing."""
        await trio.lowlevel.checkpoint()
        self._launcher.take(lambda: self._launcher.remove(job))

    async def wait_unless_silent(self, event: Waitable) -> None:
        """Wait for an event. Raises LauncherSilent."""
        while not event.is_set():
            if self.silent:
                raise launcher_silent()
            with trio.move_on_after(LOOK_SECONDS):
                await event.wait()

    async def _ask(self, effect: Callable[[], object]) -> object:
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
            if self._launcher.gone:
                raise _gone()
            if self._given_up.is_set():
                raise LauncherSilent("the service is shutting down", data={"sent": False})
            held = self._launcher.take(effect)
            await self._wait(held.answered)
        if held.fault is not None:
            raise held.fault
        return held.result

    async def _wait(self, event: trio.Event) -> None:
        """Wait for what the launcher does, unless this service gives it up."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    await self._given_up.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch)
                await event.wait()
                nursery.cancel_scope.cancel()
        if not event.is_set():
            raise LauncherSilent("cannot tell what becomes of the request")
        if self._launcher.gone:
            raise _gone()


def _told(asked: Asked | None) -> AskedBefore | None:
    """What the next service hears of why a job was sent a signal."""
    if asked is None:
        return None
    now = trio.current_time()
    told = asked.told(now)
    return AskedBefore(
        cause=told.cause,
        first_at=now - told.seconds_ago,
        kill_at=now + told.kill_in_seconds,
        signals=frozenset(asked._signals),
    )


def _gone() -> LauncherGone:
    return LauncherGone("cannot serve the request: the launcher has ended")


def _no_such_job() -> JobworkerError:
    return explain(Refusal("job", errno.ESRCH, "no such job"))
