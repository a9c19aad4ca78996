"""The size of the piece of output that each connection may send: all that send share one budget.

One follower is served fastest with large pieces. But a piece blocks the event loop while it is
encrypted, some 0.8 ms per mebibyte, and stays in memory until its client has taken it. So the
budget of one turn is divided among all connections with a piece on its way, slow clients included.
If many connections have the smallest piece, some of them wait for the next turn. A share is the
largest piece, halved several times. So followers at the same offset mostly get the same piece,
which is then encoded once.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from attrs import define, field

from jobworker.protocol.frames import PIECE_BYTES
from jobworker.server.fairness.fair_scheduling import ActiveClients, FairScheduler

TURN_BYTES = 2 * PIECE_BYTES
LEAST_BYTES = PIECE_BYTES // 16
END_BYTES = TURN_BYTES // 8
"""The cost of the message that ends a subscription, in bytes of output that take the same time."""
WAKE_BYTES = TURN_BYTES // 16
"""The least cost of waking a follower, however little output there is for it."""
FRAME_BYTES = TURN_BYTES // 128
"""The least cost of a message, however short it is."""
ALONE = 4
"""A turn may be so many times as long while no other client is active: each turn has a fixed cost,
and no other client waits for its end."""


@define(eq=False)
class SendBudget:
    """Counts the pieces on their way on all connections, and gives each connection its share."""

    _active_clients: ActiveClients
    _sending: int = field(default=0, init=False)
    _turns: FairScheduler = field(init=False)

    @_turns.default
    def _make_turns(self) -> FairScheduler:
        return FairScheduler(TURN_BYTES, self._active_clients, alone=ALONE)

    async def wait_turn(self, name: str) -> None:
        """Wait until the end of a subscription may be sent to a client of that name."""
        await self._turns.wait_turn(name, END_BYTES)

    @asynccontextmanager
    async def share(self, name: str) -> AsyncIterator[int]:
        """Wait for a turn of that name, and yield the most bytes that the block may send.

        Counts the piece as on its way until the block ends.
        """
        self._sending += 1
        try:
            share = PIECE_BYTES
            while share > LEAST_BYTES and share * self._sending > TURN_BYTES:
                share //= 2
            await self._turns.wait_turn(name, max(share, WAKE_BYTES))
            yield share
        finally:
            self._sending -= 1
