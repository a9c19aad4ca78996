"""A budget of memory for calls that are being served, until their small replies have been sent.

A call takes memory from its beginning until the client has taken its reply: for its task, for its
result, and then for the reply. The client may delay this end, since it decides when it reads. So
calls are counted in bytes, for each name and in all. A connection that has a call under way begins
another one only while its name has room. Clients that take nothing so wait for themselves
(backpressure), and all of their connections together cost a bounded amount of memory: the budget,
and one call more for each connection.

A client that takes its replies does not notice the budget. A connection without a call under way
may always begin one, and a name that has less than an equal part of the whole budget has room. A
call that waits for a job's end costs nothing here: `WaitQuota` bounds these, and the credits that
come behind it must be read. A large reply needs a slot too (`slots`).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from attrs import define, field

CALL_BYTES = 12_288
"""The cost of a call without its reply: as much as each of 12,800 calls of job.wait took."""
IN_ALL_BYTES, FOR_EACH_BYTES = 16 << 20, 2 << 20
"""A name may have 170 calls under way: all that one connection may have by default, and more than
the service serves in 0.1 s."""


@define(eq=False)
class CallBudget:
    """The budget of one service."""

    in_all: int = IN_ALL_BYTES
    for_each: int = FOR_EACH_BYTES
    _taken: Counter[str] = field(factory=Counter, init=False)
    _total: int = field(default=0, init=False)
    _waiting: "dict[str, dict[ConnectionCalls, None]]" = field(factory=dict, init=False)
    """The connections of each name that wait for room, the first ones first."""

    @property
    def taken_bytes(self) -> int:
        """What all calls that are under way cost."""
        return self._total

    def connection(self, name: str) -> "ConnectionCalls":
        """The calls of one connection of that name."""
        return ConnectionCalls(self, name)

    def has_room(self, name: str) -> bool:
        """Whether a connection of that name may begin another call beside the one that it has."""
        mine = self._taken[name]
        if mine >= self.for_each:
            return False
        return self._total < self.in_all or mine < self.in_all // max(1, len(self._taken))

    def take(self, name: str, count: int) -> None:
        """Count bytes that a call costs."""
        self._taken[name] += count
        self._total += count

    def give_back(self, name: str, count: int) -> None:
        """Count bytes no more, and let a connection go on if one waits that has room now."""
        self._total -= count
        self._taken[name] -= count
        if not self._taken[name]:
            del self._taken[name]
        for other in self._waiting:
            if self.has_room(other):
                self._waiting[other] = line = self._waiting.pop(other)  # others come first now
                next(iter(line)).go_on()
                return

    def queue(self, connection: "ConnectionCalls", name: str) -> None:
        """Have `give_back` call `connection.go_on` when it has room."""
        self._waiting.setdefault(name, {})[connection] = None

    def leave_queue(self, connection: "ConnectionCalls", name: str) -> None:
        """Undo `queue`, if the connection is still there."""
        line = self._waiting.get(name, {})
        line.pop(connection, None)
        if not line:
            self._waiting.pop(name, None)


@define(eq=False)
class ConnectionCalls:
    """The calls of one connection that are under way."""

    _budget: CallBudget
    _name: str
    _bytes: int = field(default=0, init=False)
    _room: trio.Event | None = field(default=None, init=False)
    """Set once the next call may begin; None while the connection does not wait for that."""

    async def wait_for_room(self) -> None:
        """Wait until another call may begin. Returns at once, without a checkpoint, if it may."""
        if not self._bytes or self._budget.has_room(self._name):
            return
        self._room = trio.Event()
        self._budget.queue(self, self._name)
        try:
            await self._room.wait()
        finally:
            self._budget.leave_queue(self, self._name)
            self._room = None

    def begin(self) -> "CallCost":
        """Count another call, whether there is room or not."""
        made = CallCost(self)
        made.add(CALL_BYTES)
        return made

    def go_on(self) -> None:
        """Let the connection begin a call, if it waits for that."""
        if self._room is not None:
            self._budget.leave_queue(self, self._name)
            self._room.set()

    def count(self, count: int) -> None:
        """Count more bytes, or fewer, for the calls of this connection."""
        self._bytes += count
        if count > 0:
            self._budget.take(self._name, count)
        else:
            self._budget.give_back(self._name, -count)
        if not self._bytes:
            self.go_on()


@define(eq=False)
class CallCost:
    """What one call costs, until the block ends for which it is entered."""

    _calls: ConnectionCalls
    _bytes: int = field(default=0, init=False)

    def add(self, count: int) -> None:
        """Count so many bytes more, such as those of the reply."""
        self._bytes += count
        self._calls.count(count)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._calls.count(-self._bytes)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count nothing for the call while it waits for a job in the block."""
        self.add(-CALL_BYTES)
        try:
            yield
        finally:
            self.add(CALL_BYTES)
