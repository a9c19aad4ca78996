"""Decides which jobs to end for uncounted kernel memory, from what measurements and searches found.

A job that holds more than `BOUND_BYTES` is ended at once. A job is also ended if `DOUBTS` looks in
a row had no clear result or have failed, or if a process that inspects it cannot be ended. The kill
of the job also lifts its I/O limit, which lets a job hold the kernel's locks the longest.

A job's group may count part of the memory in the job's sockets. Both numbers change during a look.
So the highest count since the look began is subtracted: the rest was certainly held and not
counted.

"Look" is the word for both: a measurement of all jobs, or a search of one. A look is identified by
the job and its source, which is the measurement, or None for the job's search.

Standard library only.
"""

import errno
from collections import Counter
from collections.abc import Callable, Collection, Hashable

from jobworker.sandbox import channel
from jobworker.sandbox.chores import UNENDING
from jobworker.sandbox.kernel_memory.measure import BOUND_BYTES
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.log import log_line

AGAIN_SECONDS = 1.0
"""The delay until the next look at a job in doubt. A descriptor is usually in flight for a shorter
time, so an innocent job is not in doubt again."""
DOUBTS = 3
"""A job is ended after so many looks in a row without a clear result, or so many that failed."""
PIPES = "pipes"
"""The source of doubts about pipes. They are counted apart: the same search may have had a clear
result for everything else."""
_WANTS = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC}
"""Errors that show a shortage on the host. They do not count against a job."""

Source = Hashable


class Verdicts:
    """The results of looks at the running jobs so far, and the ends that follow from them."""

    def __init__(
        self, running: Callable[[], dict[int, Child]], kill: Callable[[Child], None]
    ) -> None:
        self._running, self._kill = running, kill
        self._doubts: Counter[tuple[int, Source]] = Counter()
        """How many looks in a row had no clear result, by job and source."""
        self._failures: Counter[tuple[int, Source]] = Counter()
        """How many looks in a row have failed, by job and source."""
        self._counted: dict[Source, dict[int, int]] = {}
        """The highest number of bytes that a job's group has counted in sockets since the look of a
        source began. Each read resets the kernel's own maximum, so it is recorded for all sources.
        """

    @property
    def are_pending(self) -> bool:
        """Whether a job is in doubt, or a look at one has failed: then the next look comes soon."""
        return bool(self._doubts or self._failures)

    def forget_all_but(self, running: Collection[int]) -> None:
        """Drop the state of jobs that have ended."""
        for counts in (self._doubts, self._failures):
            for look in [look for look in counts if look[0] not in running]:
                del counts[look]
        for counted in self._counted.values():
            for ended in counted.keys() - running:
                del counted[ended]

    # --- counts of sockets --------------------------------------------------------------------

    def begin(self, source: Source, job: int | None = None) -> None:
        """Record that a look begins, at one job or (None) at all of them."""
        counted = self._counted.setdefault(source, {})
        if job is None:
            counted.clear()
        else:
            counted.pop(job, None)

    def judge_sockets(self, job: int, child: Child, source: Source, size: int) -> bool:
        """End a job whose sockets hold over `BOUND_BYTES` more than its group has counted.

        `size`: the bytes in its sockets. Returns whether to measure again: the maximum of the
        group's count is certain only from this call on, so the next measurement may show more.
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

    # --- looks that have failed or had no clear result ----------------------------------------

    def succeeded(self, job: int, source: Source) -> None:
        """Record that a look at this job has not failed."""
        del self._failures[job, source]

    def failed(self, job: int, source: Source, outcome: channel.Message) -> None:
        """Record that a process failed or was killed while it inspected this job.

        Ends the job if that was too often, or if the process cannot be ended.
        """
        child = self._running().get(job)
        if child is None or outcome["errno"] in _WANTS:
            return
        self._failures[job, source] += 1
        if outcome["errno"] == UNENDING:
            self._end(child, "blocks a process that inspects it and that SIGKILL does not end")
        elif self._failures[job, source] >= DOUBTS:
            self._end(child, "may hold too much uncounted kernel memory: measurements fail")

    def doubt(self, job: int, child: Child, source: Source, why: str) -> None:
        """Record whether a look had a clear result: `why` is the reason if not, or "".

        Ends the job after `DOUBTS` unclear results in a row.
        """
        if not why:
            del self._doubts[job, source]
            return
        self._doubts[job, source] += 1
        if self._doubts[job, source] >= DOUBTS:
            self._end(child, f"may hold too much uncounted kernel memory: {why}")

    def excuse_all(self) -> None:
        """Reset all doubts except those about pipes.

        To be called when little memory belongs to no known job.
        """
        for look in [look for look in self._doubts if look[1] != PIPES]:
            del self._doubts[look]

    # --- ends ---------------------------------------------------------------------------------

    def end_beyond(self, child: Child, size: int, what: str = "of uncounted kernel memory") -> None:
        """End a job if `size` is over `BOUND_BYTES`. `what` completes the reason in the log."""
        if size > BOUND_BYTES:
            self._end(child, f"holds {size >> 20} MiB {what}")

    def _end(self, child: Child, why: str) -> None:
        log_line(f"job {child.job} is ended: it {why}")
        child.hoards = True
        self._kill(child)
