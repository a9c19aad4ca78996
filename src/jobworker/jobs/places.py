"""The places of jobs: which job runs, which waits, and which is refused for want of room.

At most `max_running` jobs run, and at most `max_waiting` more wait (`waiting_room`). Further ones
are refused at once. A job keeps its place until the launcher has forgotten it.
"""

from collections import deque
from collections.abc import Iterator

import trio
from attrs import define, field

from jobworker.errors import Busy
from jobworker.jobs.execution import Execution
from jobworker.jobs.waiting_room import WaitingRoom


@define(eq=False, kw_only=True)
class Places:
    """The places of one service."""

    max_running: int
    max_waiting: int
    taken: int = field(default=0, init=False)
    """The number of jobs that were admitted and not forgotten: they run, wait, or arrive."""
    _running: int = field(default=0, init=False)
    """The number of jobs that `next` has returned and that have not finished."""
    _promised: int = field(default=0, init=False)
    """Places of jobs that were admitted to run at once and are not queued yet: no other job may
    take these."""
    _waiting: WaitingRoom = field(init=False)
    _placed: deque[Execution] = field(factory=deque, init=False)
    """Jobs that do not wait for a place: they have one, or they are only to be ended."""
    _change: trio.Event = field(factory=trio.Event, init=False)
    """Set when a job was queued, or a place has become free."""

    def __attrs_post_init__(self) -> None:
        self._waiting = WaitingRoom(self.max_waiting)

    def check_room(self, owner: str, *, arriving: int) -> None:
        """Raise Busy if a job of this owner may neither run at once nor wait.

        `arriving`: how many jobs of this owner are being admitted.
        """
        beyond = self.taken - self.max_running
        if beyond < 0 or self._waiting.has_room_for(owner, taken=beyond, arriving=arriving):
            return
        if beyond >= self.max_waiting:
            why = f"{self.max_running} jobs run and {self.max_waiting} wait already"
        else:
            why = f"{beyond} jobs wait, and the last places are for clients with few waiting jobs"
        raise Busy(
            f"cannot run the command: {why}",
            remedy="try again later, or raise worker.max_concurrent_jobs or max_waiting_jobs",
        )

    def take(self) -> bool:
        """Take a place for a job that is being admitted. Returns whether it may run at once."""
        at_once = self.taken < self.max_running
        self.taken += 1
        self._promised += at_once
        return at_once

    def keep_promise(self, at_once: bool) -> None:
        """A job that took a place has arrived, and is queued next; or it will not arrive."""
        self._promised -= at_once
        self._change.set()

    def give_back(self) -> None:
        """A job that took a place is over."""
        self.taken -= 1

    def inherit(self, execution: Execution) -> None:
        """Take a place for a job of an earlier service, and queue it."""
        self.taken += 1
        self.queue(execution)

    def queue(self, execution: Execution) -> None:
        """Have a job run at once if it was admitted so, or wait for its turn."""
        if execution.admitted_at_once:
            self._placed.append(execution)
        else:
            self._waiting.add(execution)
        self._change.set()

    def end_without_a_place(self, execution: Execution) -> None:
        """Let a job that is to end wait for its turn no more."""
        if execution in self._waiting:
            self._waiting.remove(execution)
            self._placed.append(execution)
            self._change.set()

    def take_out_waiting(self) -> Iterator[Execution]:
        """Take each waiting job out of its queue, and yield it."""
        for execution in self._waiting:
            self._waiting.remove(execution)
            yield execution

    async def next(self) -> Execution:
        """Wait for a job that may run now. It counts as running until `finished`."""
        while not self._placed and not (
            self._waiting and self._running + self._promised < self.max_running
        ):
            self._change = trio.Event()
            await self._change.wait()
        execution = self._placed.popleft() if self._placed else self._waiting.next()
        self._running += 1
        self._waiting.started(execution.record.owner)
        return execution

    def finished(self, execution: Execution) -> None:
        """A job that `next` returned does not run any more."""
        self._running -= 1
        self._waiting.finished(execution.record.owner)
        self._change.set()
