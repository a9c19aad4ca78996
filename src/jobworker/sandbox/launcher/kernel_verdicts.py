"""Whom the watch over kernel memory ends: verdicts of what was measured and found.

A job that holds more than `BOUND_BYTES` is ended at once. A job of which several looks in a row
cannot tell is ended too, and so is one at which several in a row have failed, or for which a
process waits that cannot be ended: that lifts the job's I/O limit, with which it holds the kernel's
locks longest.

A job's group may count part of what its sockets hold. Both change meanwhile, so the highest count
since the measurement or the search began comes off: what is left was surely held and not counted.

A look is known by the job and by its source, which is a measurement, or None for the job's search.

Standard library only.
"""

import errno
from collections import Counter
from collections.abc import Callable, Collection, Hashable

from jobworker.sandbox import channel
from jobworker.sandbox.chores import UNENDING
from jobworker.sandbox.kernel_memory.measure import BOUND_BYTES
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.log import say

AGAIN_SECONDS = 1.0
"""A job in doubt is looked at again so soon: a descriptor is in flight for a moment, usually."""
DOUBTS = 3
"""So many in a row end a job, and so many looks at it that have failed."""
PIPES = "pipes"
"""A source of doubts of its own: a search that found what pipes may hold has told all else."""
_WANTS = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC}
"""What the host may lack, for which no job is to blame."""

Source = Hashable


class Verdicts:
    """What looks have told of the running jobs so far."""

    def __init__(
        self, running: Callable[[], dict[int, Child]], kill: Callable[[Child], None]
    ) -> None:
        self._running, self._kill = running, kill
        self._doubts: Counter[tuple[int, Source]] = Counter()
        """How many in a row could not tell of a job."""
        self._failures: Counter[tuple[int, Source]] = Counter()
        """How many looks in a row at a job have failed."""
        self._counted: dict[Source, dict[int, int]] = {}
        """What jobs' groups counted in sockets at most since a source's look began.
        A read sets the kernel's own figure back, whichever of them it is for."""

    @property
    def are_pending(self) -> bool:
        """Whether some job is to be looked at again soon."""
        return bool(self._doubts or self._failures)

    def forget_all_but(self, running: Collection[int]) -> None:
        """Drop what concerns jobs that have ended."""
        for counts in (self._doubts, self._failures):
            for look in [look for look in counts if look[0] not in running]:
                del counts[look]
        for counted in self._counted.values():
            for ended in counted.keys() - running:
                del counted[ended]

    # --- counts of sockets --------------------------------------------------------------------

    def begin(self, source: Source, job: int | None = None) -> None:
        """A look begins, at one job or at all of them."""
        counted = self._counted.setdefault(source, {})
        if job is None:
            counted.clear()
        else:
            counted.pop(job, None)

    def judge_sockets(self, job: int, child: Child, source: Source, size: int) -> bool:
        """End a job whose sockets hold too much beyond what its group counts.

        Returns whether to measure again: the count is only surely known of a time to come.
        """
        if size <= BOUND_BYTES:
            return False
        most, now = child.scope.sockets_counted()
        self._counted.setdefault(source, {})
        for counted in self._counted.values():
            counted[job] = max(counted.get(job, 0), most)
        uncounted = size - self._counted[source][job]
        self.end_beyond(child, uncounted, "in sockets that its control group does not count")
        return size - now > BOUND_BYTES

    # --- looks that have failed or cannot tell ------------------------------------------------

    def succeeded(self, job: int, source: Source) -> None:
        """A look at this job has not failed."""
        del self._failures[job, source]

    def failed(self, job: int, source: Source, outcome: channel.Message) -> None:
        """A process has failed while it looked at this job, or had to be ended."""
        child = self._running().get(job)
        if child is None or outcome["errno"] in _WANTS:
            return
        self._failures[job, source] += 1
        if outcome["errno"] == UNENDING:
            self._end(child, "has a process that looks at it wait without an end")
        elif self._failures[job, source] >= DOUBTS:
            self._end(child, "may hold too much uncounted kernel memory: looks at it fail")

    def doubt(self, job: int, child: Child, source: Source, why: str) -> None:
        """Count one more in a row that could not tell, for this reason, or none that could."""
        if not why:
            del self._doubts[job, source]
            return
        self._doubts[job, source] += 1
        if self._doubts[job, source] >= DOUBTS:
            self._end(child, f"may hold too much uncounted kernel memory: {why}")

    def excuse_all(self) -> None:
        """What is nobody's is little again: no job is in doubt for it any more."""
        for look in [look for look in self._doubts if look[1] != PIPES]:
            del self._doubts[look]

    # --- ends ---------------------------------------------------------------------------------

    def end_beyond(self, child: Child, size: int, what: str = "of uncounted kernel memory") -> None:
        """End a job that holds more than the bound."""
        if size > BOUND_BYTES:
            self._end(child, f"holds {size >> 20} MiB {what}")

    def _end(self, child: Child, why: str) -> None:
        say(f"job {child.job} is ended: it {why}")
        child.hoards = True
        self._kill(child)
