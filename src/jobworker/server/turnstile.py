"""Lets tasks pass, a few of each client's name in each turn of the event loop.

Each connection has tasks of its own, and a turn of the loop runs all that are ready: whoever opens
two hundred and asks on all of them would have two hundred requests served before anybody else's.
"""

from collections import Counter

import trio
from attrs import define, field

from jobworker.jobs.paced import in_turns


@define(eq=False)
class Turnstile:
    """Who has passed during this turn of the loop, and who waits for the next."""

    _most: int
    """What may pass in a turn, by the costs that `enter` is told: the names share it, but one of
    each may always pass."""
    _passed: Counter[str] = field(factory=Counter, init=False)
    _waiting: dict[str, dict[trio.lowlevel.Task, int]] = field(factory=dict, init=False)
    """By name, in their order, with their costs."""
    _turning: bool = field(default=False, init=False)

    async def enter(self, name: str, cost: int = 1) -> None:
        """Wait for a turn of this name. Without others of the name it is no checkpoint."""
        if self._passed[name] < self._part() and name not in self._waiting:
            self._passed[name] += cost
            self._turn_on()
        else:
            await self._wait(name, cost)

    async def _wait(self, name: str, cost: int) -> None:
        task, line = trio.lowlevel.current_task(), self._waiting.setdefault(name, {})
        line[task] = cost
        self._turn_on()

        def leave(_: object) -> trio.lowlevel.Abort:
            del line[task]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave)

    def _part(self) -> int:
        return max(1, self._most // max(1, len(self._waiting)))

    def _turn_on(self) -> None:
        if not self._turning:
            self._turning = True
            trio.lowlevel.current_trio_token().run_sync_soon(in_turns, self._next_turn)

    def _next_turn(self) -> bool:
        self._passed.clear()
        part = self._part()
        for name, line in tuple(self._waiting.items()):
            while line and self._passed[name] < part:
                task = next(iter(line))
                self._passed[name] += line.pop(task)
                trio.lowlevel.reschedule(task)
            if not line:
                del self._waiting[name]
        self._turning = bool(self._passed)
        return self._turning
