"""Finds out at a job's end whether its volumes have lost what was written to them.

A volume is written out for that, which may take long, by a process of its own.

Standard library only.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial

from jobworker.sandbox import channel
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.children import Nursery
from jobworker.sandbox.log import say

INSPECT_AGAIN_SECONDS = 0.1
MAX_INSPECTIONS = 20
"""Of those that began: a process that is killed each time is not started for ever."""


class VolumeLosses:
    """The processes that look; `tell_end` is called of each job once it is known."""

    def __init__(self, nursery: Nursery, tell_end: Callable[[Child], None]) -> None:
        self._turns, self._nursery, self._tell_end = nursery.turns, nursery, tell_end
        self._inspectors = Chores(self._turns, nursery.forks, at_once=nursery.slots, waiting=0)
        self._lacks_inspectors = False
        """Whether the latest one could not be started; the log was told then."""

    def find(self, child: Child) -> None:
        """Find out whether what the job wrote to its volumes is there, and tell its end."""
        if not child.volume_roots:
            self._turns.see_through(partial(self._tell_end, child))
            return
        work = partial(_find_losses, dict(child.volume_roots))
        roots = list(child.volume_roots.values())
        child.inspected = True
        try:
            self._inspectors.start(work, partial(self._on_inspected, child), roots)
        except OSError as error:  # no descriptor to be had
            self._lack_inspector(child, str(error))

    def _lack_inspector(self, child: Child, why: str) -> None:
        """There is no process to be had for a job's volumes: for how long, nobody knows."""
        if not self._lacks_inspectors:
            say(f"cannot look at the volumes of ended jobs, and tries again: {why}")
        self._lacks_inspectors = True
        if child.job is None:  # removed meanwhile: nobody is told of its end
            self._on_inspected(child, {"lost": []})
        else:
            self._turns.call_in(INSPECT_AGAIN_SECONDS, partial(self.find, child))

    def _on_inspected(self, child: Child, outcome: channel.Message) -> None:
        if outcome.get("begun") is False:
            self._lack_inspector(child, os.strerror(int(str(outcome["errno"]))))
            return
        self._lacks_inspectors = False
        child.inspections += 1
        lost = outcome.get("lost")
        if isinstance(lost, list):
            child.lost += lost
        elif child.inspections < MAX_INSPECTIONS:  # it was killed: that says nothing of the volumes
            self._turns.call_in(INSPECT_AGAIN_SECONDS, partial(self.find, child))
            return
        else:
            child.unseen += child.volume_roots
            say(f"job {child.job}: cannot look at its volumes, and gives up: {outcome}")
        child.inspected = False
        self._turns.see_through(partial(self._nursery.give_back_volumes, child))
        self._turns.see_through(partial(self._tell_end, child))


def _find_losses(volumes: Mapping[str, int]) -> channel.Message:
    """In a process of its own: the volumes that have lost writes."""
    return {"lost": [n for n, root in volumes.items() if disk_images.volume_lost_writes(root)]}
