"""Finds out at a job's end whether its volumes have lost writes.

To find that out, a process of its own writes the job's volumes out, which may take long.

Standard library only.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial

from jobworker.sandbox import channel
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.log import log_line

INSPECT_AGAIN_SECONDS = 0.1
MAX_INSPECTIONS = 20
"""How many processes may look at the volumes of a job. If each one is killed, the launcher gives
up."""


class VolumeLosses:
    """The processes that write volumes out. `tell_end` is called for each job when it is known."""

    def __init__(self, pool: ChildPool, tell_end: Callable[[Child], None]) -> None:
        self._event_loop, self._pool, self._tell_end = pool.event_loop, pool, tell_end
        self._inspectors = Chores(self._event_loop, pool.forks, at_once=pool.slots, waiting=0)
        self._lacks_inspectors = False
        """Whether the latest process could not be started; that is in the log once."""

    def find(self, child: Child) -> None:
        """Find out whether a job's volumes have lost writes, and then report the job's end."""
        if not child.volume_roots:
            self._event_loop.call_with_retries(partial(self._tell_end, child))
            return
        work = partial(_find_losses, dict(child.volume_roots))
        roots = list(child.volume_roots.values())
        child.inspected = True
        try:
            self._inspectors.start(work, partial(self._on_inspected, child), roots)
        except OSError as error:  # no descriptor is left
            self._lack_inspector(child, str(error))

    def _lack_inspector(self, child: Child, why: str) -> None:
        """Try again later, since no process can be made now for a job's volumes."""
        if not self._lacks_inspectors:
            log_line(f"cannot look at the volumes of ended jobs, and tries again: {why}")
        self._lacks_inspectors = True
        if child.job is None:  # it was removed meanwhile: its end is reported to no one
            self._on_inspected(child, {"lost": []})
        else:
            self._event_loop.call_later(INSPECT_AGAIN_SECONDS, partial(self.find, child))

    def _on_inspected(self, child: Child, outcome: channel.Message) -> None:
        if outcome.get("begun") is False:
            self._lack_inspector(child, os.strerror(int(str(outcome["errno"]))))
            return
        self._lacks_inspectors = False
        child.inspections += 1
        lost = outcome.get("lost")
        if isinstance(lost, list):
            child.lost += lost
        elif child.inspections < MAX_INSPECTIONS:  # the process was killed before it had a result
            self._event_loop.call_later(INSPECT_AGAIN_SECONDS, partial(self.find, child))
            return
        else:
            child.unseen += child.volume_roots
            log_line(f"job {child.job}: cannot look at its volumes, and gives up: {outcome}")
        child.inspected = False
        self._event_loop.call_with_retries(partial(self._pool.release_volumes, child))
        self._event_loop.call_with_retries(partial(self._tell_end, child))


def _find_losses(volumes: Mapping[str, int]) -> channel.Message:
    """In the process: write the volumes out, and return the names of those that lost writes."""
    return {"lost": [n for n, root in volumes.items() if disk_images.volume_lost_writes(root)]}
