"""Ended jobs' first processes, collected a little later than their status is read.

Collecting a process, waitid(2), has the kernel forget what /proc showed of it. A job can make that
long: a look at each of 20,000 descriptors in /proc/1/fd took 30 ms then. The job's own /proc goes
with its mounts, mostly within a moment after the last process has ended; then there is nothing left
to forget. Where it is not gone after the delay, the limit on open files bounds it. A process that
has ended and was not collected takes a number, and no control group waits for it.

Standard library only.
"""

import os
import time
from collections import deque

from jobworker.sandbox.event_loop import Turns

COLLECT_SECONDS = 1.0


class Zombies:
    """Processes that have ended and whose status is known."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._ended: deque[tuple[float, int]] = deque()

    def take(self, pidfd: int) -> None:
        """Collect this process in a moment; the descriptor stays the caller's."""
        try:
            own = os.dup(pidfd)
        except OSError:  # no descriptor to be had: at once, then
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            return
        self._ended.append((time.monotonic() + COLLECT_SECONDS, own))
        if not self._turns.is_set(self._collect):
            self._turns.call_in(COLLECT_SECONDS, self._collect)

    def _collect(self) -> None:
        now = time.monotonic()
        while self._ended and self._ended[0][0] <= now:
            _, pidfd = self._ended.popleft()
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
        if self._ended:
            self._turns.call_in(self._ended[0][0] - now, self._collect)
