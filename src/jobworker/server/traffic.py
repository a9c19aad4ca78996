"""How large a piece each connection may send, by how many are sending.

One follower is served fastest by large pieces, and a service by small ones: a piece holds the
event loop for as long as it is encrypted, some 0.8 ms a mebibyte, and is held in memory for as long
as its client lets it wait. So a turn's worth is divided among those that have a piece on its way,
with those whose clients let it wait. Shares are the largest piece halved some times, so that
followers at one place mostly have the same one, which is then encoded once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from attrs import define

from jobworker.protocol.frames import PIECE_BYTES

TURN_BYTES = 16 * PIECE_BYTES
LEAST_BYTES = PIECE_BYTES // 16


@define(eq=False)
class Traffic:
    """What is under way on all connections together."""

    _sending: int = 0

    @contextmanager
    def share(self) -> Iterator[int]:
        """Send a piece during the block: of how many bytes, at the most."""
        self._sending += 1
        try:
            share = PIECE_BYTES
            while share > LEAST_BYTES and share * self._sending > TURN_BYTES:
                share //= 2
            yield share
        finally:
            self._sending -= 1
