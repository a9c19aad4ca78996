"""How large a piece each connection may send, by how many are sending.

One follower is served fastest by large pieces, and a service by small ones: a piece holds the
event loop for as long as it is encrypted, some 0.8 ms a mebibyte, and is held in memory for as long
as its client lets it wait. So a turn's worth is divided among those that have a piece on its way,
with those whose clients let it wait; where many have the smallest piece, some of them wait for the
next turn. Shares are the largest piece halved some times, so that
followers at one place mostly have the same one, which is then encoded once.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from attrs import define, field

from jobworker.protocol.frames import PIECE_BYTES
from jobworker.server.turnstile import Presence, Turnstile

TURN_BYTES = 2 * PIECE_BYTES
LEAST_BYTES = PIECE_BYTES // 16
END_BYTES = TURN_BYTES // 8
"""What telling an end costs, in bytes that are sent in the same time."""
WAKE_BYTES = TURN_BYTES // 16
"""What a follower costs that has to be woken, however little there is for it."""
FRAME_BYTES = TURN_BYTES // 128
"""What a message costs, however short it is."""
ALONE = 4
"""Turns of a thousand followers are so many times as long while no other client asks for anything:
each turn has its own cost, and nobody waits for its end."""


@define(eq=False)
class Traffic:
    """What is under way on all connections together."""

    _presence: Presence
    _sending: int = field(default=0, init=False)
    _turns: Turnstile = field(init=False)

    @_turns.default
    def _make_turns(self) -> Turnstile:
        return Turnstile(TURN_BYTES, self._presence, alone=ALONE)

    async def take_turn(self, name: str) -> None:
        """Wait until the end of a subscription may be told to a client of that name."""
        await self._turns.enter(name, END_BYTES)

    @asynccontextmanager
    async def share(self, name: str) -> AsyncIterator[int]:
        """Send a piece to a client of that name in the block: of so many bytes, at the most."""
        self._sending += 1
        try:
            share = PIECE_BYTES
            while share > LEAST_BYTES and share * self._sending > TURN_BYTES:
                share //= 2
            await self._turns.enter(name, max(share, WAKE_BYTES))
            yield share
        finally:
            self._sending -= 1
