"""What comes in on one connection: one large request at a time, in a slot of its own.

The slot is taken when a message has grown large, before more of it is read, and given back when the
request has been served. Until then nothing more is read from the client (TCP's backpressure makes
it wait), so a connection holds one large request at the most. A client that has a slot and sends
nothing for too long is let go.
"""

import math

import trio
from attrs import define, field

from jobworker.server.slots import LARGE_BYTES, Slots


@define(eq=False)
class Intake:
    """Of one connection."""

    _slots: Slots
    _name: str
    _stall_seconds: float
    _holding: bool = field(default=False, init=False)
    _served: trio.Event | None = field(default=None, init=False)
    """Set once the large request that is being served has been; None where there is none."""
    _closed: bool = field(default=False, init=False)

    async def wait_for_room(self, size: int) -> float:
        """Wait until more may be read of a message that has `size` so far.

        Returns the seconds within which more has to come.
        """
        if self._served is not None:
            await self._served.wait()
        if size > LARGE_BYTES and not self._holding:
            await self._slots.take(self._name)
            self._holding = True
            if self._closed:
                self._give_back()
        return self._stall_seconds if self._holding else math.inf

    def begin(self) -> None:
        """A large request has come whole and is being served."""
        self._served = trio.Event()

    def end(self) -> None:
        """It has been."""
        if self._served is not None:
            self._served.set()
            self._served = None
        self._give_back()

    def close(self) -> None:
        """Nothing is read any more."""
        self._closed = True
        self.end()

    def _give_back(self) -> None:
        if self._holding:
            self._holding = False
            self._slots.give_back(self._name)
