"""Turns for the handshakes of one address: one after the other, drawn by lot among those that wait.

By lot, so that nobody has to wait for all who came before: an honest client amid a flood from its
own address has the same chance as each of the flood's connections at every turn. Those whose peers
have closed cost no turn.
"""

import math
import random
from typing import Protocol

import trio
from attrs import define, field

from jobworker.errors import JobworkerError

TURN_SECONDS = 0.0025
"""Between two handshakes of an address that is slowed down."""


class Waiter(Protocol):
    """A connection that waits for its turn."""

    def is_gone(self) -> bool:
        """Whether the peer has closed."""

    def let_go(self, why: JobworkerError | None) -> None:
        """End it, which cancels `Turns.take`; None where there is nothing to tell."""


@define(eq=False)
class Turns:
    """Of one address."""

    _next: float = field(default=-math.inf, init=False)
    """When the next turn may begin."""
    _waiting: list[tuple[Waiter, trio.CancelScope]] = field(factory=list, init=False)
    """Each scope is cancelled once its turn has come."""
    _drawing: trio.Lock = field(factory=trio.Lock, init=False)
    """Held by the one of them that waits for the time of the next turn, to draw whose it is."""

    async def take(self, waiter: Waiter) -> None:
        """Wait for a turn."""
        with trio.CancelScope() as turn:
            mine = (waiter, turn)
            self._waiting.append(mine)
            try:
                while True:
                    async with self._drawing:
                        await trio.sleep_until(max(self._next, trio.current_time()))
                        self._draw()
                        await trio.lowlevel.checkpoint()
            finally:
                if mine in self._waiting:
                    self._waiting.remove(mine)

    def _draw(self) -> None:
        while self._waiting:
            waiter, turn = self._take_out()
            if not waiter.is_gone():
                self._next = trio.current_time() + TURN_SECONDS
                turn.cancel()
                return
            waiter.let_go(None)

    def _take_out(self) -> tuple[Waiter, trio.CancelScope]:
        at, last = random.randrange(len(self._waiting)), self._waiting[-1]  # noqa: S311
        taken, self._waiting[at] = self._waiting[at], last
        self._waiting.pop()
        return taken
