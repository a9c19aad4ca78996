"""Lets messages in, a few of each client's name in each turn of the event loop.

Each connection has a task of its own, and a turn of the loop runs all that are ready: whoever opens
two hundred and asks on all of them would have two hundred requests served before anybody else's.
"""

from collections import Counter

import trio
from attrs import define, field

from jobworker.jobs.paced import in_turns

AT_A_TIME = 4
"""Of one name in one turn: one to two milliseconds."""


@define(eq=False)
class Turnstile:
    """Who has come in during this turn of the loop, and who waits for the next."""

    _passed: Counter[str] = field(factory=Counter, init=False)
    _waiting: dict[str, trio.lowlevel.ParkingLot] = field(factory=dict, init=False)
    _turning: bool = field(default=False, init=False)

    async def enter(self, name: str) -> None:
        """Wait for a turn of this name."""
        if self._passed[name] < AT_A_TIME and name not in self._waiting:
            self._passed[name] += 1
        else:
            lot = self._waiting.setdefault(name, trio.lowlevel.ParkingLot())
            self._turn_on()
            await lot.park()
        self._turn_on()

    def _turn_on(self) -> None:
        if not self._turning:
            self._turning = True
            trio.lowlevel.current_trio_token().run_sync_soon(in_turns, self._next_turn)

    def _next_turn(self) -> bool:
        self._passed.clear()
        for name, lot in tuple(self._waiting.items()):
            self._passed[name] = len(lot.unpark(count=AT_A_TIME))
            if not lot:
                del self._waiting[name]
        self._turning = bool(self._passed)
        return self._turning
