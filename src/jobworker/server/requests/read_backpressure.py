"""Backpressure for one connection: the server reads one large request at a time, in a slot.

When a message has grown large, the reader takes a slot before it reads more of it. The slot is
given back when the request has been served. Until then the server reads nothing more from the
client, and TCP makes the client wait. So a connection holds one large request at the most. If
others wait for the slot, the server ends the connection of a client that has it and sends nothing
for too long, or less than `LEAST_BYTES_PER_SECOND`. While a client sends a large request, it counts
as active (`fair_scheduling.ActiveClients`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from attrs import define, field

from jobworker.errors import JobworkerError, PermissionDenied, TooSlow
from jobworker.server.fairness.fair_scheduling import ActiveClients
from jobworker.server.fairness.slots import LARGE_BYTES, LEAST_BYTES_PER_SECOND, LOOK_SECONDS, Slots

UNREAD = "\0" * (LARGE_BYTES + 1)
"""Replaces a large message that was dropped: it is large too, and never JSON, whatever follows."""


def refusal_of_large(
    message: str | bytes, denied: JobworkerError | None
) -> PermissionDenied | None:
    """The error for a large message of a client that may not run jobs; else None.

    `denied`: the error if the client may not run jobs now. Its role may have changed while it sent
    the message, whose first part was then dropped.
    """
    if denied is not None:
        why, remedy = "only clients that may run jobs may send one", denied.remedy
    elif isinstance(message, str) and message.startswith(UNREAD):
        why, remedy = "the client's role did not allow it when the message began", "send it again"
    else:
        return None
    return PermissionDenied(
        f"cannot take a message of more than {LARGE_BYTES} characters: {why}", remedy=remedy
    )


@define(eq=False)
class ReadBackpressure:
    """Decides when more may be read from one connection."""

    _slots: Slots
    _name: str
    _stall_seconds: float
    _active_clients: ActiveClients
    _holding: bool = field(default=False, init=False)
    _served: trio.Event | None = field(default=None, init=False)
    """Set once the current large request has been served; None if there is no such request."""
    _closed: bool = field(default=False, init=False)
    _began: tuple[float, int] = field(default=(0.0, 0), init=False)
    """When the slot was taken, and how many bytes of the message had come by then."""
    _grew: tuple[float, int] = field(default=(0.0, 0), init=False)
    """When the message last grew, and how many bytes had come by then."""
    _pausing: int = field(default=0, init=False)
    pauses: int = field(default=0, init=False)
    """How many pauses have ended."""
    _stops: int = field(default=0, init=False)
    """How many reasons there are now to read nothing more, or no whole message."""
    stretches: int = field(default=0, init=False)
    """How often there has come to be a reason."""
    _watchers: trio.lowlevel.ParkingLot = field(factory=trio.lowlevel.ParkingLot, init=False)
    """Here tasks wait for the next reason."""

    @property
    def paused(self) -> bool:
        """Whether the server now reads nothing from the client, not even answers to pings."""
        return self._pausing > 0

    @property
    def is_stopped(self) -> bool:
        """Whether the server may not come to the client's next message now, or a ping behind it."""
        return self._stops > 0

    async def wait_for_stop(self) -> None:
        """Wait until `is_stopped`."""
        while not self.is_stopped:
            await self._watchers.park()

    async def wait_for_room(self, size: int) -> float:
        """Wait until the rest of a message may be read, of which `size` bytes have come.

        Returns the time in seconds for which the caller may wait for more bytes; then it calls this
        again. Raises TooSlow if the client sends too slowly and others wait for its slot.
        """
        if self._served is not None:
            with self.pause():
                await self._served.wait()
        if size > LARGE_BYTES and not self._holding:
            with self.pause():
                await self._slots.acquire(self._name)
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
            self._active_clients.mark_active(self._name)
        earned = (size - self._began[1]) / LEAST_BYTES_PER_SECOND
        left = min(self._grew[0], self._began[0] + earned) + self._stall_seconds - now
        if left > 0:
            return left
        if not self._slots.are_wanted_of(self._name):
            return LOOK_SECONDS
        raise TooSlow(
            "cannot wait for the rest of a large message: others wait, and the client sent nothing "
            f"for {self._stall_seconds:g} s, or less than {LEAST_BYTES_PER_SECOND} bytes a second"
        )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count the block as a pause, in which nothing is read; pauses may overlap."""
        self._pausing += 1
        try:
            with self.stop():
                yield
        finally:
            self._pausing -= 1
            self.pauses += 1

    @contextmanager
    def stop(self) -> Iterator[None]:
        """Count the block as one in which the next message has to wait: another is being taken."""
        self.stretches += not self._stops
        self._stops += 1
        self._watchers.unpark_all()
        try:
            yield
        finally:
            self._stops -= 1

    def begin(self) -> trio.Event:
        """Record that a large request has come whole. Returns the event that `end` sets."""
        self._served = trio.Event()
        return self._served

    def end(self) -> None:
        """Record that the large request has been served, and give its slot back."""
        if self._served is not None:
            self._served.set()
            self._served = None
        self._give_back()

    def close(self) -> None:
        """Give the slot back for good: the connection reads nothing any more."""
        self._closed = True
        self.end()

    def _give_back(self) -> None:
        if self._holding:
            self._holding = False
            self._slots.release(self._name)
