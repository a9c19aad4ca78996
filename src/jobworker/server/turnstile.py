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
from collections import Counter
from collections.abc import AsyncIterator, Container
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

import trio
from attrs import define, field
from trio.testing import wait_all_tasks_blocked

log = logging.getLogger("jobworker")

RECENT_SECONDS = 0.5
REST = 2
"""For so many times as long as a turn took, all that it has set going included, floods rest."""
MAX_REST_SECONDS = 0.01
"""After a turn that was long for another reason, such as a busy host; and for so long at the most
it is waited until nobody else has anything to do."""
MAX_LONG_REST_SECONDS = 2.0


@define(eq=False)
class Presence:
    """Who has asked for something a moment ago."""

    _seen: dict[str, float] = field(factory=dict, init=False)

    def saw(self, name: str) -> None:
        """This client has asked."""
        self._seen[name] = trio.current_time()

    def of_others(self, than: Container[str]) -> bool:
        """Whether there is somebody else."""
        since = trio.current_time() - RECENT_SECONDS
        for name in [name for name, at in self._seen.items() if at < since]:
            del self._seen[name]
        return any(name not in than for name in self._seen)

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
    """Long work in threads, which compete with the event loop: one at a time, then a rest.

    One of each client's name stands in line with those of others.
    """

    _presence: Presence
    _lines: WeakValueDictionary[str, trio.StrictFIFOLock] = field(
        factory=WeakValueDictionary, init=False
    )
    _lock: trio.StrictFIFOLock = field(factory=trio.StrictFIFOLock, init=False)
    _rests_until: float = field(default=-math.inf, init=False)

    @asynccontextmanager
    async def one(self, name: str) -> AsyncIterator[None]:
        """Work for a client of that name in the block, when the time has come."""
        async with self._lines.setdefault(name, trio.StrictFIFOLock()), self._lock:
            await trio.sleep_until(self._rests_until)
            began = trio.current_time()
            try:
                yield
            finally:
                now = trio.current_time()
                if self._presence.of_others((name,)):
                    self._rests_until = now + min(REST * (now - began), MAX_LONG_REST_SECONDS)


@define(eq=False)
class Turnstile:
    """Who has passed during this turn of the loop, and who waits for the next."""

    _most: int
    """What may pass in a turn, by the costs that `enter` is told: the names share it, but one of
    each may always pass."""
    _presence: Presence
    _most_seconds: float = MAX_REST_SECONDS
    """Of a rest."""
    _passed: Counter[str] = field(factory=Counter, init=False)
    _waiting: dict[str, dict[trio.lowlevel.Task, int]] = field(factory=dict, init=False)
    """By name, in their order, with their costs."""
    _began: float | None = field(default=None, init=False)
    """When the turn began, while one is counted."""
    _keeper: trio.lowlevel.Task | None = field(default=None, init=False)

    async def enter(self, name: str, cost: int = 1) -> None:
        """Wait for a turn of this name. Without others of the name it is no checkpoint."""
        if self._passed[name] < self._part() and name not in self._waiting:
            self._passed[name] += cost
            self._count()
        else:
            await self._wait(name, cost)

    async def _wait(self, name: str, cost: int) -> None:
        task, line = trio.lowlevel.current_task(), self._waiting.setdefault(name, {})
        line[task] = cost
        self._count()

        def leave(_: object) -> trio.lowlevel.Abort:
            del line[task]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave)

    def _part(self) -> int:
        return max(1, self._most // max(1, len(self._waiting)))

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
        part = self._part()
        for name, line in tuple(self._waiting.items()):
            while line and self._passed[name] < part:
                task = next(iter(line))
                self._passed[name] += line.pop(task)
                trio.lowlevel.reschedule(task)
            if not line:
                del self._waiting[name]
        self._began = trio.current_time() if self._passed else None
