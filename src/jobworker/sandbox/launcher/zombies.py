"""Has the first processes of ended jobs reaped, a second after their exit status was read.

Reaping takes long if somebody has looked up many names below the process's /proc, so a thread does
it (`sandbox.reaper`). The job's own /proc mostly goes with its mounts, within a moment after its
last process has ended; then few names are left after the delay. A process that has ended and is not
reaped takes a pid and nothing else: its control group can be removed.

Standard library only.
"""

import os
import time
from collections import deque

from jobworker.sandbox import reaper
from jobworker.sandbox.event_loop import EventLoop

COLLECT_SECONDS = 1.0


class Zombies:
    """Processes that have ended, whose exit status is known, and that are not reaped yet."""

    def __init__(self, event_loop: EventLoop) -> None:
        self._event_loop = event_loop
        self._ended: deque[tuple[float, int]] = deque()

    def add(self, pidfd: int) -> None:
        """Have this process reaped in `COLLECT_SECONDS`. The caller keeps its descriptor."""
        try:
            own = os.dup(pidfd)
        except OSError:  # no descriptor is left: reap it at once, in this thread
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            return
        self._ended.append((time.monotonic() + COLLECT_SECONDS, own))
        if not self._event_loop.is_scheduled(self._collect):
            self._event_loop.call_later(COLLECT_SECONDS, self._collect)

    def _collect(self) -> None:
        now = time.monotonic()
        due = [pidfd for when, pidfd in self._ended if when <= now]
        if due and reaper.start(due):
            for _ in due:
                self._ended.popleft()
        if self._ended:
            wait = self._ended[0][0] - now
            self._event_loop.call_later(wait if wait > 0 else COLLECT_SECONDS, self._collect)
