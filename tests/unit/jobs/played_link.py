"""What one service has of a played launcher, in place of
`sandbox.service.launcher_client.LauncherClient`."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Self

import trio
from attrs import define, field

from jobworker.errors import LauncherSilent
from jobworker.model.job import JobId
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.protocol.end_requests import EndRequest, EndRequestLog
from jobworker.sandbox.service.exchange import LOOK_SECONDS, Waitable
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.service.job_reports import EarlierEndRequest, JobExit
from jobworker.sandbox.service.launcher_errors import launcher_silent
from jobworker.sandbox.start.plan import Order

from .kept_launcher import KeptLauncher, Starting, launcher_gone
from .played_program import Program


@define(eq=False)
class ServiceLink:
    """One service's requests to the launcher."""

    _launcher: KeptLauncher
    unstarted: frozenset[JobId] = field(kw_only=True)
    inherited: dict[JobId, tuple[Started, Exits]] = field(factory=dict, init=False)
    keeps_asks: bool = field(default=True, init=False)
    service: object = field(default=None, init=False)
    """Who uses it, once that has taken over."""
    _given_up: trio.Event = field(factory=trio.Event, init=False)
    _pipes: list[tuple[int, int]] = field(factory=list, init=False)
    """The ends of pipes that this service was given: their numbers, and what they are."""
    _exits: dict[JobId, trio.MemorySendChannel[JobExit]] = field(factory=dict, init=False)

    @classmethod
    def connect(cls, launcher: KeptLauncher) -> Self:
        """Have the launcher serve a service, which takes over what there is."""
        link = cls(launcher, unstarted=frozenset(launcher.unstarted))
        link.inherited = {job: link.expect(each) for job, each in sorted(launcher.programs.items())}
        launcher.connect(link)
        return link

    def disconnect(self) -> None:
        """End the connection: what was sent has its effect, and nothing more is."""
        self.give_up()
        self._launcher.disconnect(self)

    def die(self) -> None:
        """Be gone with a service that was killed: what it still does moves and reaches nothing."""
        self.disconnect()
        pipes, self._pipes = self._pipes, []
        for number, what in pipes:
            if _what_is(number) == what:  # else it was closed
                trio.lowlevel.notify_closing(number)
                at_its_end, writer = os.pipe2(os.O_NONBLOCK)
                os.dup2(at_its_end, number, inheritable=False)
                close_all([at_its_end, writer])
                self._pipes.append((number, _what_is(number)))

    def close_pipes(self) -> None:
        """Close what the service had of programs, as the end of the process does."""
        close_all([number for number, what in self._pipes if _what_is(number) == what])

    @property
    def silent(self) -> bool:
        """Whether the launcher is there and has not answered for a while."""
        return self._launcher.is_silent and not self._given_up.is_set()

    def expect(self, program: Program) -> tuple[Started, Exits]:
        """What a service gets of a program, and where it hears of its end."""
        send, receive = trio.open_memory_channel[JobExit](1)
        self._exits[program.job] = send
        if program.exit is not None:
            self.on_exit(program)
        stdout, stderr = map(os.dup, program.reads)
        self._pipes += [(number, _what_is(number)) for number in (stdout, stderr)]
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
        assert isinstance(starting, Starting)
        await self._wait(starting.decided)
        if starting.fault is not None:
            raise starting.fault
        return self.expect(self._launcher.programs[job])

    async def signal(self, job: JobId, number: signal.Signals, ask: EndRequest) -> bool:
        """Send a signal."""
        return bool(await self._ask(lambda: self._launcher.signal(job, number, ask)))

    async def kill(self, job: JobId, ask: EndRequest) -> None:
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
                raise launcher_gone()
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
            raise launcher_gone()


def _told(asked: EndRequestLog | None) -> EarlierEndRequest | None:
    """What the next service hears of why a job was sent a signal."""
    if asked is None:
        return None
    now = trio.current_time()
    told = asked.report(now)
    return EarlierEndRequest(
        cause=told.cause,
        first_at=now - told.seconds_ago,
        kill_at=now + told.kill_in_seconds,
        signals=frozenset(asked._signals),
    )


def _what_is(number: int) -> int:
    """The inode of an open file; 0 where it is none."""
    try:
        return os.fstat(number).st_ino
    except OSError:
        return 0
