"""Turns for the handshakes of one address: one at a time, drawn by lot among the waiting ones.

With a lot, no connection has to wait for all that came before it: amid a flood from its own
address, an honest client has the same chance as each connection of the flood at every turn. A
connection whose peer has closed costs no turn.
"""

import math
import random
from typing import Protocol

import trio
from attrs import define, field

from jobworker.errors import JobworkerError

TURN_SECONDS = 0.0025
"""The time between two handshakes of an address that is slowed down."""


class LotteryEntrant(Protocol):
    """A connection that waits for its turn."""

    def is_gone(self) -> bool:
        """Whether the peer has closed."""

    def drop(self, why: JobworkerError | None) -> None:
        """End the connection, which cancels `HandshakeLottery.wait_turn`; None logs nothing."""


@define(eq=False)
class HandshakeLottery:
    """The waiting handshakes of one address."""

    _next: float = field(default=-math.inf, init=False)
    """When the next turn may begin."""
    _waiting: list[tuple[LotteryEntrant, trio.CancelScope]] = field(factory=list, init=False)
    """Each scope is cancelled once its turn has come."""
    _drawing: trio.Lock = field(factory=trio.Lock, init=False)
    """Held by the waiting task that sleeps until the next turn and then draws whose turn it is."""

    async def wait_turn(self, waiter: LotteryEntrant) -> None:
        """Wait until it is this connection's turn to begin its handshake."""
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
            waiter.drop(None)

    def _take_out(self) -> tuple[LotteryEntrant, trio.CancelScope]:
        at, last = random.randrange(len(self._waiting)), self._waiting[-1]  # noqa: S311
        taken, self._waiting[at] = self._waiting[at], last
        self._waiting.pop()
        return taken
