"""A sweep: one application of a policy to kept output, in portions that others wait for.

A sweep may have to remove the output of 100,000 jobs. Between two portions it holds no lock and no
thread, so a job that ends, or a client that removes a job, waits for one portion at most. Jobs end
and other output goes meanwhile. So each portion counts anew what is there, and the sweep removes
no more than the policy asks for. Output of jobs that end after the sweep began is left to the next
one: otherwise a sweep might not end while jobs do.
"""

import time
from collections.abc import Callable
from contextlib import suppress

from attrs import define, field

from jobworker.errors import OutOfDescriptors
from jobworker.jobs.retention import KeptOutput
from jobworker.jobs.retention_policy import EndedOutput, RetentionPolicy, keeps
from jobworker.model.job import JobId

PORTION_JOBS = 32
"""The most outputs in one portion. To record their removals takes SQLite some 2 ms."""
PORTION_SECONDS = 0.025
"""A portion ends after this time. A removal takes 0.2 to 0.6 ms, on a busy host several."""
PORTION_BYTES = 64 << 20
"""A portion ends once it has removed so much: ext4 frees a gigabyte in 40 ms."""


@define(eq=False, kw_only=True)
class Sweep:
    """A sweep over `kept`, the oldest end first. `gone` is what it has removed so far.

    A removal that fails is not tried again. Such output still takes space, so by size the next one
    has to go in its place. By number it counts as removed.
    """

    _kept: KeptOutput
    _policy: RetentionPolicy
    _owner: str | None = None
    """Whose jobs' output may be removed, and counts. None: that of all."""
    _live_bytes: Callable[[], int] = lambda: 0
    """Returns the bytes of the output of live jobs."""
    gone: list[EndedOutput] = field(factory=list, init=False)
    is_over: bool = field(default=False, init=False)
    _now_ns: int = field(init=False)
    _last: tuple[int, JobId] = field(init=False)
    """The end of the newest output when the sweep began, and its job."""
    _position: tuple[int, JobId] = field(default=(-1, JobId(0)), init=False)
    """The end that the sweep has come to, and its job."""
    _tried: set[JobId] = field(factory=set, init=False)
    """A removal that fails may give the entry a later end: then the sweep comes to it again."""
    _staying: set[JobId] = field(factory=set, init=False)
    """Jobs whose output could not be removed."""

    def __attrs_post_init__(self) -> None:
        self._now_ns = self._kept.now_ns()
        self._last = self._kept.last

    def portion(self) -> list[JobId]:
        """Remove some output. Returns the jobs, none perhaps. Call it until `is_over`, in a thread.

        Raises nothing: what cannot be removed stays.
        """
        ends_at = time.monotonic() + PORTION_SECONDS
        removed, size = list[JobId](), 0
        self._staying = {job for job in self._staying if job in self._kept.all}
        while len(removed) < PORTION_JOBS and size < PORTION_BYTES:
            each = self._kept.next_after(self._position)
            if each is None or (each.ended_ns, each.job) > self._last:
                self.is_over = True
                break
            self._position = (each.ended_ns, each.job)
            if self._owner in (None, self._kept.owner_of(each.job)):
                if self._keeps(each):
                    self.is_over = True
                    break
                if self._removes(each):
                    removed.append(each.job)
                    size += each.size
            if time.monotonic() > ends_at:
                break
        return removed

    def _keeps(self, oldest: EndedOutput) -> bool:
        number = self._kept.number_of(self._owner) - len(self._staying)
        size = self._live_bytes() + self._kept.size_of(self._owner)
        return keeps(self._policy, oldest, number=number, size=size, now_ns=self._now_ns)

    def _removes(self, each: EndedOutput) -> bool:
        """Remove an output. Returns whether it was removed now."""
        if each.job in self._tried:
            return False
        self._tried.add(each.job)
        with suppress(OutOfDescriptors):  # the next sweep tries again
            if self._kept.try_removal(each.job):
                self.gone.append(each)
                return True
        if each.job in self._kept.all:
            self._staying.add(each.job)
        return False


def prune(kept: KeptOutput, policy: RetentionPolicy) -> list[EndedOutput]:
    """Remove the output that a policy does not keep, in one go. Returns what was removed."""
    sweep = Sweep(kept=kept, policy=policy)
    while not sweep.is_over:
        sweep.portion()
    return sweep.gone
