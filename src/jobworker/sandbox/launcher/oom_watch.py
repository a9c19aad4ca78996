"""Ends a job as a whole when the kernel has killed a part of it for its own memory limit.

cgroup v2 does that by itself (memory.oom.group). v1 kills one process of the group, and tells
of it by an event that comes up to some milliseconds before the kill is counted, and also for a
group above, where nothing of this job is killed. So the count is looked at for a while. A job
that lost a process because the host or a group above had no memory goes on: what that means for
it, its program knows best.

Standard library only.
"""

import time
from collections.abc import Callable
from functools import partial

from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.launcher.child import Child

LOOK_SECONDS = 0.1
LOOK_AGAIN_SECONDS = 0.002


class OomWatch:
    """Children whose scope told of an OOM, and until when to look for the kill."""

    def __init__(self, turns: Turns, kill: Callable[[Child], None]) -> None:
        self._turns, self._kill = turns, kill
        self._suspects: dict[Child, float] = {}

    def watch(self, child: Child) -> None:
        """Watch a child's scope, where its kind needs that."""
        if child.scope.oom_fd is not None:
            self._turns.watch(child.scope.oom_fd, partial(self._on_event, child))

    def forget(self, child: Child) -> None:
        """Stop watching: to be called before the scope is removed."""
        if child.scope.oom_fd is not None:
            self._turns.unwatch(child.scope.oom_fd)
        self._suspects.pop(child, None)

    def _on_event(self, child: Child) -> None:
        child.scope.clear_oom()
        self._suspects[child] = time.monotonic() + LOOK_SECONDS
        self._turns.call_in(0, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        for child, until in list(self._suspects.items()):
            killed = child.exit is None and child.want() == "limit"
            if killed:
                self._kill(child)
            if killed or child.exit is not None or now > until:
                del self._suspects[child]
        if self._suspects:
            self._turns.call_in(LOOK_AGAIN_SECONDS, self._look)
