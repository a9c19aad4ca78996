"""Closes descriptors that a hostile sender or job may have made slow to close.

The last close(2) of a socket with SO_LINGER waits as long as its maker said; of a file on a
file system of the sender's own, for ever; of a job's disk, until a million inodes are forgotten. So
the launcher never makes it: `give_away` has a process of its own inherit the descriptors, the
launcher closes its copies, and only then does that process go on. While one is under way more can
be taken, up to a bound; whoever lets senders in is to ask `overloaded` first.

Standard library only.
"""

import os
from collections.abc import Sequence
from functools import partial

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.event_loop import Turns

MAX_PROCESSES = 4
AGAIN_SECONDS = 0.1


def give_away(descriptors: Sequence[int]) -> tuple[int, int]:
    """Clone a process that is then alone in holding `descriptors`: (pid, pidfd), as `clone3`.

    In the process this returns (0, -1) once the launcher has closed its copies: whatever close is
    the last one, it is not the launcher's. Raises OSError, and all is as before.
    """
    go, gone = os.pipe2(os.O_CLOEXEC)
    try:
        pid, pidfd = sc.clone3(0)
    except OSError:  # no process to be had
        close_all([go, gone])
        raise
    if pid == 0:
        os.close(gone)
        os.read(go, 1)  # the end of the stream
        os.close(go)
        return 0, -1
    close_all(descriptors)
    close_all([gone, go])
    return pid, pidfd


def close_all_but(kept: list[int]) -> None:
    """Close what belongs to others: it would be kept open."""
    first = 3
    for descriptor in sorted(kept):
        if descriptor > first:
            sc.close_range(first, descriptor - 1)
        first = descriptor + 1
    sc.close_range(first)


class Disposal:
    """Descriptors on their way out."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._waiting: list[int] = []
        self._processes: set[int] = set()

    @property
    def overloaded(self) -> bool:
        """Whether some wait for a process."""
        return bool(self._waiting)

    def take(self, descriptors: list[int]) -> None:
        """Close these, sooner or later, without making the caller wait."""
        self._waiting += descriptors
        self._start()

    def _start(self) -> None:
        if not self._waiting or len(self._processes) >= MAX_PROCESSES:
            return
        try:
            pid, pidfd = give_away(self._waiting)
        except OSError:
            self._turns.call_in(AGAIN_SECONDS, self._start)
            return
        if pid == 0:
            os._exit(0)
        self._waiting.clear()
        self._processes.add(pidfd)
        on_exit = partial(self._on_exit, pidfd)
        try:
            self._turns.watch(pidfd, on_exit)
        except OSError:  # of epoll: no memory, or no more watches to be had
            self._turns.call_in(AGAIN_SECONDS, on_exit)

    def _on_exit(self, pidfd: int) -> None:
        """Collect a process that has ended; else look again later."""
        self._turns.unwatch(pidfd)
        if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None:
            self._turns.call_in(AGAIN_SECONDS, partial(self._on_exit, pidfd))
            return
        os.close(pidfd)
        self._processes.discard(pidfd)
        self._start()
