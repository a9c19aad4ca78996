"""Reaps the first processes of ended jobs a second after their exit status was read.

When a process is reaped by waitid(2), the kernel drops the entries of /proc for it. A job can make
that slow: after it had looked up 20,000 descriptors in /proc/1/fd, it took 30 ms. But the job's own
/proc goes with its mounts, mostly within a moment after its last process has ended, and then no
entries are left. If it is not gone after the delay, the job's limit on open files bounds the time.
A process that has ended and is not reaped takes a pid and nothing else: its control group can be
removed.

Standard library only.
"""

import os
import time
from collections import deque

from jobworker.sandbox.event_loop import EventLoop

COLLECT_SECONDS = 1.0


class Zombies:
    """Processes that have ended, whose exit status is known, and that are not reaped yet."""

    def __init__(self, event_loop: EventLoop) -> None:
        self._event_loop = event_loop
        self._ended: deque[tuple[float, int]] = deque()

    def add(self, pidfd: int) -> None:
        """Reap this process in `COLLECT_SECONDS`. The caller keeps its descriptor."""
        try:
            own = os.dup(pidfd)
        except OSError:  # no descriptor is left: reap it at once
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            return
        self._ended.append((time.monotonic() + COLLECT_SECONDS, own))
        if not self._event_loop.is_scheduled(self._collect):
            self._event_loop.call_later(COLLECT_SECONDS, self._collect)

    def _collect(self) -> None:
        now = time.monotonic()
        while self._ended and self._ended[0][0] <= now:
            _, pidfd = self._ended.popleft()
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
        if self._ended:
            self._event_loop.call_later(self._ended[0][0] - now, self._collect)
