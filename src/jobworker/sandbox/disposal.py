"""Closes descriptors that a hostile sender or job may have made slow to close.

The last close(2) of a socket with SO_LINGER waits as long as its maker said; of a file on a
file system of the sender's own, for ever; of a job's disk, until a million inodes are forgotten. So
the launcher never makes it: a chore is given the descriptors, the launcher closes its copies, and
only then does the chore go on, to its end. While some are under way more can be taken, up to a
bound; whoever lets senders in is to ask `overloaded` first.

Standard library only.
"""

from functools import partial

from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.forks import ForkServer

MAX_PROCESSES = 4
MAX_EACH = 200
"""Descriptors that one process is given: as many as go along with a call."""
AGAIN_SECONDS = 0.1


class Disposal:
    """Descriptors on their way out."""

    def __init__(self, turns: Turns, forks: ForkServer) -> None:
        self._turns = turns
        self._waiting: list[int] = []
        self._chores = Chores(turns, forks, at_once=MAX_PROCESSES, waiting=0)

    @property
    def overloaded(self) -> bool:
        """Whether some wait for a process."""
        return bool(self._waiting)

    def take(self, descriptors: list[int]) -> None:
        """Close these, sooner or later, without making the caller wait."""
        self._waiting += descriptors
        self._start()

    def _start(self) -> None:
        if not self._waiting or self._chores.running >= MAX_PROCESSES:
            return
        given = self._waiting[:MAX_EACH]
        try:
            self._chores.start(end, partial(self._on_end, given), given=given)
        except OSError:
            self._turns.call_in(AGAIN_SECONDS, self._start)
            return
        del self._waiting[:MAX_EACH]

    def _on_end(self, given: list[int], outcome: Message) -> None:
        if "begun" in outcome:  # there was no process to be had
            self._waiting += given
            self._turns.call_in(AGAIN_SECONDS, self._start)
        else:
            self._start()


def end() -> Message:
    """What a process does that only has to end, and with it its descriptors."""
    return {}
