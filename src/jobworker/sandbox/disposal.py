"""Closes descriptors that a hostile sender or job may have made slow to close.

The last close(2) of a descriptor may block: of a socket with SO_LINGER, as long as its maker has
set; of a file on a file system of the sender's own (FUSE), for ever; of a job's disk, until the
kernel has freed a million inodes. So the launcher never makes the last close. A chore gets the
descriptors, the launcher closes its own copies, and only then the chore goes on and exits, which
closes the rest.

`add` accepts descriptors at any time, and those for which no process is free wait. What must hold:
the listener checks `overloaded` before it accepts another sender, so that few descriptors wait.

Standard library only.
"""

from functools import partial

from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer

MAX_PROCESSES = 4
MAX_EACH = 200
"""The most descriptors for one process: fewer than `fork_server.MAX_PASSED`, the bound of a call.
"""
AGAIN_SECONDS = 0.1


class Disposal:
    """The descriptors that wait to be closed, and the processes that close them."""

    def __init__(self, event_loop: EventLoop, forks: ForkServer) -> None:
        self._event_loop = event_loop
        self._waiting: list[int] = []
        self._chores = Chores(event_loop, forks, at_once=MAX_PROCESSES, waiting=0)

    @property
    def overloaded(self) -> bool:
        """Whether descriptors wait for a process."""
        return bool(self._waiting)

    def add(self, descriptors: list[int]) -> None:
        """Have a process close these descriptors. Returns without waiting for that."""
        self._waiting += descriptors
        self._start()

    def _start(self) -> None:
        if not self._waiting or self._chores.running >= MAX_PROCESSES:
            return
        given = self._waiting[:MAX_EACH]
        try:
            self._chores.start(end, partial(self._on_end, given), given=given)
        except OSError:
            self._event_loop.call_later(AGAIN_SECONDS, self._start)
            return
        del self._waiting[:MAX_EACH]

    def _on_end(self, given: list[int], outcome: Message) -> None:
        if "begun" in outcome:  # no process could be made, so the descriptors are still open
            self._waiting += given
            self._event_loop.call_later(AGAIN_SECONDS, self._start)
        else:
            self._start()


def end() -> Message:
    """The work of the process: nothing, since its exit closes the descriptors."""
    return {}
