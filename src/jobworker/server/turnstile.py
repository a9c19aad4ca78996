"""Lets tasks pass, a few of each client's name in each turn of the event loop.

Each connection has tasks of its own, and a turn of the loop runs all that are ready: whoever opens
two hundred and asks on all of them would have two hundred requests served before anybody else's.

A request of anybody takes several turns. So where some have to wait, and others are about who do
not, the next turn of those who wait begins when the loop has nothing else to do and has then been
left alone for some time: a flood has a third of the loop at most, and the others find it idle
mostly. Who is alone has all of it.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple
from weakref import WeakValueDictionary

import trio
from attrs import define, field

from jobworker.bucket import Bucket
from jobworker.server.idle import wait_all_tasks_blocked
from jobworker.threads import in_thread

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

log = logging.getLogger("jobworker")

RECENT_SECONDS = 0.5
WAITING_SECONDS = 5.0
"""For so long at the most somebody who waits for an answer counts as being about."""
BURST_SECONDS = 0.5
"""Of its rate, what a name may pass at once."""
REST = 2
"""For so many times as long as a turn took, all that it has set going included, floods rest."""
MAX_REST_SECONDS = 0.01
"""After a turn that was long for another reason, such as a busy host; and for so long at the most
it is waited until nobody else has anything to do."""
MAX_LONG_REST_SECONDS = 2.0
SPELL_BURST_SECONDS, SPELL_SHARE = 0.1, 0.05
"""What a name may use of a processor for long work before that stands in line: so much at once,
with the rest of the work that it ends with, and that share in the long run."""
MAX_SPELL_THREADS = 20
"""Of these too, so that no flood takes the threads that jobs need. The largest requests (`slots`)
leave most of them to others."""


@define(eq=False)
class Presence:
    """Who has come, sent or asked for something a moment ago, or waits for the answer.

    A client that waits for the start of its job, or for the end of a short one, needs the processor
    as much as one that asks: if a flood had all of it meanwhile, the client would only wait longer.
    But who waits for hours is not about all that time.
    """

    _until: dict[str, float] = field(factory=dict, init=False)
    _came: dict[tuple[str, str], float] = field(factory=dict, init=False)
    """Until when somebody who has come counts, by name and by the line that let it in."""
    _served: Counter[str] = field(factory=Counter, init=False)
    """How many requests of each are being served."""

    def saw(self, name: str) -> None:
        """This client has asked, or sends what will be a request."""
        self._extend(name, RECENT_SECONDS)

    def came(self, name: str, line: str) -> None:
        """This client has come, let in by that line of newcomers, and is about to ask.

        Nobody is an other for the line that let them in, before they ask. Otherwise a flood of
        connections would make its own line rest, and an honest client that stands in the same line
        would wait three times as long.
        """
        self._came[name, line] = trio.current_time() + RECENT_SECONDS

    @contextmanager
    def served(self, name: str) -> Iterator[None]:
        """A request of this client is served in the block."""
        self._served[name] += 1
        self._extend(name, WAITING_SECONDS)
        try:
            yield
        finally:
            self._served[name] -= 1
            if not self._served[name]:
                del self._served[name]
                self._until[name] = trio.current_time() + RECENT_SECONDS

    def _extend(self, name: str, seconds: float) -> None:
        self._until[name] = max(self._until.get(name, 0.0), trio.current_time() + seconds)

    def of_others(self, than: Container[str]) -> bool:
        """Whether there is somebody else."""
        now = trio.current_time()
        for name in [name for name, until in self._until.items() if until < now]:
            del self._until[name]
        for key in [key for key, until in self._came.items() if until < now]:
            del self._came[key]
        let_in = {name for name, line in self._came if line in than}
        came = (name for name, _ in self._came if name not in let_in)
        return any(name not in than for name in (*self._until, *came))

    async def rest_after(
        self, began: float, than: Container[str] = (), most_seconds: float = MAX_REST_SECONDS
    ) -> None:
        """Rest after work that began then, where others `than` those who wait are about.

        What the work has set going ends first, and counts; not for longer than twice
        `most_seconds` in all.
        """
        if self.of_others(than):
            with trio.move_on_after(most_seconds):
                await wait_all_tasks_blocked()
            worked = trio.current_time() - began
            await trio.sleep(min(REST * worked, most_seconds))


@define(eq=False)
class Spells:
    """Long work in threads, which compete with the event loop: of each client's name one at a time.

    Each name has an account of a thread's time. While it is in credit its work begins at once,
    beside that of others. Else it stands in the one line of those whose account is overdrawn: one
    of them works at a time, and a rest follows. That is not charged to the account.
    """

    _presence: Presence
    _lines: WeakValueDictionary[str, trio.StrictFIFOLock] = field(
        factory=WeakValueDictionary, init=False
    )
    """Of each name that has work."""
    _lock: trio.StrictFIFOLock = field(factory=trio.StrictFIFOLock, init=False)
    _rests_until: float = field(default=-math.inf, init=False)
    _accounts: dict[str, Bucket] = field(factory=dict, init=False)
    """Of those that have worked of late, in seconds."""
    _threads: trio.CapacityLimiter = field(
        factory=lambda: trio.CapacityLimiter(MAX_SPELL_THREADS), init=False
    )

    async def run(self, name: str, work: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """Do work for a client of that name in a thread, when the time has come."""
        async with self._lines.setdefault(name, trio.StrictFIFOLock()):
            account = self._accounts.get(name)
            if account is None or not account.is_overdrawn(trio.current_time()):
                return await self._run_on_account(name, work, *arguments)
            async with self._lock:
                await trio.sleep_until(self._rests_until)
                began = trio.current_time()
                try:
                    return await in_thread(work, *arguments, limiter=self._threads)
                finally:
                    now = trio.current_time()
                    if self._presence.of_others((name,)):
                        self._rests_until = now + min(REST * (now - began), MAX_LONG_REST_SECONDS)

    async def _run_on_account(
        self, name: str, work: Callable[[*Arguments], T], *arguments: *Arguments
    ) -> T:
        spent = 0.0

        def timed() -> T:
            nonlocal spent
            began = time.thread_time()  # the time of day would count what others' threads take
            try:
                return work(*arguments)
            finally:
                spent = time.thread_time() - began

        try:
            return await in_thread(timed, limiter=self._threads)
        finally:
            now = trio.current_time()
            for rested in [who for who, one in self._accounts.items() if one.is_full(now)]:
                del self._accounts[rested]
            new = Bucket(now, SPELL_BURST_SECONDS, SPELL_SHARE)
            self._accounts.setdefault(name, new).draw(now, spent)


@define(eq=False)
class Turnstile:
    """Who has passed during this turn of the loop, and who waits for the next."""

    _most: int
    """What may pass in a turn, by the costs that `enter` is told: the names share it, but one of
    each may always pass."""
    _presence: Presence
    _most_seconds: float = MAX_REST_SECONDS
    """Of a rest."""
    _rate: float = math.inf
    """What each name may pass by in a second, in the long run, where others are about."""
    _alone: int = 1
    """So many times as much passes in a turn that begins while no others are about."""
    _most_now: int = field(default=0, init=False)
    """What may pass in this turn."""
    _accounts: dict[str, Bucket] = field(factory=dict, init=False)
    _passed: Counter[str] = field(factory=Counter, init=False)
    _waiting: dict[str, dict[trio.lowlevel.Task, int]] = field(factory=dict, init=False)
    """By name, in their order, with their costs."""
    _began: float | None = field(default=None, init=False)
    """When the turn began, while one is counted."""
    _keeper: trio.lowlevel.Task | None = field(default=None, init=False)

    async def enter(self, name: str, cost: int = 1) -> None:
        """Wait for a turn of this name. Without others of the name it is no checkpoint.

        A name that asks for more than its rate waits even so, where others are about.
        """
        account = self._charge(name, cost)
        try:
            if account is not None and (seconds := account.seconds_overdrawn(trio.current_time())):
                await trio.sleep(seconds)
            if self._began is None:
                self._look_about((name,))
            if self._passed[name] < self._part() and name not in self._waiting:
                self._passed[name] += cost
                self._count()
            else:
                await self._wait(name, cost)
        except trio.Cancelled:  # it does not pass: else who only comes and goes owes for hours
            if account is not None:
                account.draw(trio.current_time(), -cost)
            raise

    async def _wait(self, name: str, cost: int) -> None:
        task, line = trio.lowlevel.current_task(), self._waiting.setdefault(name, {})
        line[task] = cost
        self._count()

        def leave(_: object) -> trio.lowlevel.Abort:
            del line[task]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave)

    def _charge(self, name: str, cost: int) -> Bucket | None:
        """The account that was charged; None where the name has no rate now."""
        if self._rate == math.inf:
            return None
        now = trio.current_time()
        account = self._accounts.get(name)
        if account is None:
            for rested in [who for who, one in self._accounts.items() if one.is_full(now)]:
                del self._accounts[rested]
            account = self._accounts[name] = Bucket(now, self._rate * BURST_SECONDS, self._rate)
        if not account.take(now, cost):
            if not self._presence.of_others((name,)):
                return None
            account.draw(now, cost)
        return account

    def _part(self) -> int:
        return max(1, self._most_now // max(1, len(self._waiting)))

    def _look_about(self, than: Container[str]) -> None:
        self._most_now = self._most
        if self._alone > 1 and not self._presence.of_others(than):
            self._most_now *= self._alone

    def _count(self) -> None:
        if self._began is None:
            self._began = trio.current_time()
            if self._keeper is None:
                self._keeper = trio.lowlevel.spawn_system_task(self._keep)
            else:
                trio.lowlevel.reschedule(self._keeper)

    async def _keep(self) -> None:
        """Begin one turn after the other, for as long as somebody passes."""
        while True:
            while self._began is not None:
                await trio.lowlevel.checkpoint()
                try:
                    if self._waiting:
                        await self._presence.rest_after(
                            self._began, self._waiting, self._most_seconds
                        )
                    self._begin()
                except Exception:  # it would end the whole event loop
                    log.exception("an internal fault between two turns")
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)

    def _begin(self) -> None:
        self._passed.clear()
        self._look_about(self._waiting)
        part = self._part()
        for name, line in tuple(self._waiting.items()):
            while line and self._passed[name] < part:
                task = next(iter(line))
                self._passed[name] += line.pop(task)
                trio.lowlevel.reschedule(task)
            if not line:
                del self._waiting[name]
        self._began = trio.current_time() if self._passed else None
