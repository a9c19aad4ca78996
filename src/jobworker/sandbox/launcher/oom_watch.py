"""Ends a whole job when the kernel has killed one of its processes for the job's own memory limit.

On cgroup v2 the kernel does that by itself (memory.oom.group). On v1 the kernel kills one process
of the group and signals an event. The event comes up to some milliseconds before the kill is
counted. It also comes for an OOM of a group above, which may kill no process of this job. So the
watch reads the count again and again for `LOOK_SECONDS` after an event. If a process was killed
because the host or a group above had no memory, the job goes on, since its program can decide best
what to do.

Standard library only.
"""

import time
from collections.abc import Callable
from functools import partial

from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.launcher.child import Child

LOOK_SECONDS = 0.1
LOOK_AGAIN_SECONDS = 0.002


class OomWatch:
    """Children with an OOM event, each with the time until which the kill may still be counted."""

    def __init__(self, event_loop: EventLoop, kill: Callable[[Child], None]) -> None:
        self._event_loop, self._kill = event_loop, kill
        self._suspects: dict[Child, float] = {}

    def watch(self, child: Child) -> None:
        """Watch the OOM events of a child's scope, if it has any (v1)."""
        if child.scope.oom_fd is not None:
            self._event_loop.watch(child.scope.oom_fd, partial(self._on_event, child))

    def forget(self, child: Child) -> None:
        """Stop watching a child. To be called before its scope is closed."""
        if child.scope.oom_fd is not None:
            self._event_loop.unwatch(child.scope.oom_fd)
        self._suspects.pop(child, None)

    def _on_event(self, child: Child) -> None:
        child.scope.clear_oom()
        self._suspects[child] = time.monotonic() + LOOK_SECONDS
        self._event_loop.call_later(0, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        for child, until in list(self._suspects.items()):
            killed = child.exit is None and child.want() == "limit"
            if killed:
                self._kill(child)
            if killed or child.exit is not None or now > until:
                del self._suspects[child]
        if self._suspects:
            self._event_loop.call_later(LOOK_AGAIN_SECONDS, self._look)
