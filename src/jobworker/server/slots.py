"""Slots for what is large, shared fairly: so many in all, and so many for each name.

A large request takes memory from its first byte until it has been served, and a large reply until
its client has taken it, for as long as the client likes. So each needs a slot, and the memory for
all of them is bounded however many connections there are. One name (the certificate's) has a part
of the slots at the most: whoever fills its own, on any number of connections, waits for itself.
The last quarter of the slots is for names that have none, so that a few names together cannot make
all others wait. A slot comes free in a bounded time, since messages are sent and taken at a least
rate. What is small needs none, so it never waits here.
"""

from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from attrs import define, field, frozen

LARGE_BYTES = 32_768
"""A request or a reply of more needs a slot."""
LEAST_BYTES_PER_SECOND = 65_536
"""What a client sends, or takes, whose slot somebody waits for, after a grace of
`server.stall_timeout`: a message of 4 MiB has another 64 s."""
LOOK_SECONDS = 1.0
"""How often it is looked whether somebody waits for the slot of one that is slower."""
_KEPT_PART = 4
"""A quarter of the slots is for names that have none."""


@frozen
class Statistics:
    """How many there are at this moment."""

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

    def statistics(self) -> Statistics:
        """How many are taken, and how many wait."""
        return Statistics(taken=self._taken.total(), waiting=len(self._waiting))

    def are_wanted_of(self, name: str) -> bool:
        """Whether somebody waits for whom a slot of this name's stands in the way."""
        return any(who == name or self._taken[who] < self.for_each for who, _ in self._waiting)

    def take_nowait(self, name: str) -> bool:
        """Take a slot if one is free for that name."""
        mine = self._taken[name]
        room = self.in_all - self.in_all // _KEPT_PART if mine else self.in_all
        if self._taken.total() >= room or mine >= self.for_each:
            return False
        self._taken[name] += 1
        return True

    async def take(self, name: str) -> None:
        """Take a slot, in turn with the others that wait."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.take_nowait(name):
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        waiting = (name, trio.Event())
        self._waiting.append(waiting)
        try:
            await waiting[1].wait()
        except trio.Cancelled:
            if waiting[1].is_set():  # after it was cancelled, and before it ran
                self.give_back(name)
            else:
                self._waiting.remove(waiting)
            raise

    def give_back(self, name: str) -> None:
        """Free a slot, for the first that waits and may have it.

        A name that has none now may have one of the last quarter besides.
        """
        self._taken[name] -= 1
        if not self._taken[name]:
            del self._taken[name]
        for waiting in tuple(self._waiting):
            if self.take_nowait(waiting[0]):
                self._waiting.remove(waiting)
                waiting[1].set()

    @asynccontextmanager
    async def slot(self, name: str) -> AsyncIterator[None]:
        """Have a slot during the block."""
        await self.take(name)
        try:
            yield
        finally:
            self.give_back(name)
