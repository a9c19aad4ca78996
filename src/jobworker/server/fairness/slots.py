"""A fair semaphore for large requests and replies: so many slots in all, and so many for each name.

A large request takes memory from its first byte until it has been served. A large reply takes
memory until its client has taken it, which the client may delay. So each needs a slot, and the
memory for all of them is bounded, however many connections there are. One name (the certificate's)
gets a part of the slots at the most. A client that has filled its part, on any number of
connections, waits for itself. The last quarter of the slots is for names that have none, so that a
few names together cannot make all others wait. A slot comes free in a bounded time, since clients
must send and take messages at a least rate. Small messages need no slot, so they never wait here.
"""

from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from attrs import define, field, frozen

LARGE_BYTES = 32_768
"""A request or a reply of more bytes needs a slot."""
LEAST_BYTES_PER_SECOND = 65_536
"""The least rate at which a client must send or take a large message while others wait for its
slot, after a grace of `server.stall_timeout`: a message of 4 MiB has another 64 s."""
LOOK_SECONDS = 1.0
"""How often the server checks whether others wait for the slot of a client below that rate."""
_KEPT_PART = 4
"""A quarter of the slots is for names that have none."""


@frozen
class SlotStatistics:
    """How many slots are taken and how many tasks wait for one, at this moment."""

    taken: int
    waiting: int


@define(eq=False)
class Slots:
    """Slots of one kind, of one service."""

    in_all: int
    for_each: int
    _taken: Counter[str] = field(factory=Counter, init=False)
    _waiting: deque[tuple[str, trio.Event]] = field(factory=deque, init=False)
    """Each event is set once its slot has been taken for it."""

    def statistics(self) -> SlotStatistics:
        """The number of slots that are taken, and of tasks that wait for one."""
        return SlotStatistics(taken=self._taken.total(), waiting=len(self._waiting))

    def are_wanted_of(self, name: str) -> bool:
        """Whether a task waits that could have a slot if this name gave one back."""
        return any(who == name or self._taken[who] < self.for_each for who, _ in self._waiting)

    def acquire_nowait(self, name: str) -> bool:
        """Take a slot if one is free for that name; returns whether it took one."""
        mine = self._taken[name]
        room = self.in_all - self.in_all // _KEPT_PART if mine else self.in_all
        if self._taken.total() >= room or mine >= self.for_each:
            return False
        self._taken[name] += 1
        return True

    async def acquire(self, name: str) -> None:
        """Wait for a slot and take it; the waiting tasks get slots in the order in which they came.

        A task whose name has all the slots that it may have is passed over.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.acquire_nowait(name):
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        waiting = (name, trio.Event())
        self._waiting.append(waiting)
        try:
            await waiting[1].wait()
        except trio.Cancelled:
            if waiting[1].is_set():  # the slot came after the cancellation, before this task ran
                self.release(name)
            else:
                self._waiting.remove(waiting)
            raise

    def release(self, name: str) -> None:
        """Give a slot back, and hand free slots to the waiting tasks that may have one.

        If it was the last slot of this name, a task of the name may now get one of the last quarter
        too.
        """
        self._taken[name] -= 1
        if not self._taken[name]:
            del self._taken[name]
        for waiting in tuple(self._waiting):
            if self.acquire_nowait(waiting[0]):
                self._waiting.remove(waiting)
                waiting[1].set()

    @asynccontextmanager
    async def slot(self, name: str) -> AsyncIterator[None]:
        """Hold a slot during the block."""
        await self.acquire(name)
        try:
            yield
        finally:
            self.release(name)
