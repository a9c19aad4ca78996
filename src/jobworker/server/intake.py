"""What comes in on one connection: one large request at a time, in a slot of its own.

The slot is taken when a message has grown large, before more of it is read, and given back when the
request has been served. Until then nothing more is read from the client (TCP's backpressure makes
it wait), so a connection holds one large request at the most. Where others wait for the slot, a
client that has it and sends nothing for too long, or less than `LEAST_BYTES_PER_SECOND`, is let go.
While it sends, it counts as being about (`turnstile.Presence`): what it asks for is on its way.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from attrs import define, field

from jobworker.errors import TooSlow
from jobworker.server.slots import LARGE_BYTES, LEAST_BYTES_PER_SECOND, LOOK_SECONDS, Slots
from jobworker.server.turnstile import Presence


@define(eq=False)
class Intake:
    """Of one connection."""

    _slots: Slots
    _name: str
    _stall_seconds: float
    _presence: Presence
    _holding: bool = field(default=False, init=False)
    _served: trio.Event | None = field(default=None, init=False)
    """Set once the large request that is being served has been; None where there is none."""
    _closed: bool = field(default=False, init=False)
    _began: tuple[float, int] = field(default=(0.0, 0), init=False)
    """When the slot was taken, and how much of the message there was."""
    _grew: tuple[float, int] = field(default=(0.0, 0), init=False)
    """When more of the message was seen last, and how much there was."""
    _pausing: int = field(default=0, init=False)
    pauses: int = field(default=0, init=False)
    """How many have ended."""

    @property
    def paused(self) -> bool:
        """Whether nothing is read from the client now, its answers to pings included."""
        return self._pausing > 0

    async def wait_for_room(self, size: int) -> float:
        """Wait until more may be read of a message that has `size` so far.

        Returns the seconds within which more has to come, or this is to be asked again. Raises
        TooSlow if it has not and somebody waits for the slot.
        """
        if self._served is not None:
            with self.pause():
                await self._served.wait()
        if size > LARGE_BYTES and not self._holding:
            with self.pause():
                await self._slots.take(self._name)
            self._holding = True
            now = trio.current_time()
            self._began, self._grew = (now, size), (now, 0)
            if self._closed:
                self._give_back()
        return self._seconds_left(size) if self._holding else math.inf

    def _seconds_left(self, size: int) -> float:
        now = trio.current_time()
        if size != self._grew[1]:
            self._grew = now, size
            self._presence.saw(self._name)
        earned = (size - self._began[1]) / LEAST_BYTES_PER_SECOND
        left = min(self._grew[0], self._began[0] + earned) + self._stall_seconds - now
        if left > 0:
            return left
        if not self._slots.are_wanted_of(self._name):
            return LOOK_SECONDS
        raise TooSlow(
            f"cannot wait for the rest of a large message: others wait, and nothing came for "
            f"{self._stall_seconds:g} s, or less than {LEAST_BYTES_PER_SECOND} bytes a second"
        )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is read in the block; it may overlap with another."""
        self._pausing += 1
        try:
            yield
        finally:
            self._pausing -= 1
            self.pauses += 1

    def begin(self) -> trio.Event:
        """A large request has come whole and is being served. Returns what is set at its end."""
        self._served = trio.Event()
        return self._served

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
