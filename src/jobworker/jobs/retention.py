"""Retention: the output of ended jobs that is kept, and its removal.

A policy (`retention_policy`, applied by `sweep`) chooses among entries: one `EndedOutput` for each
ended job whose output is on the disk. The entries are read from the directories when the service
starts and are kept up to date from then on, in the order of the ends. There may be 100,000 of them.
So, except at the start, no single call of a C function goes through all of them, since it would
keep the interpreter's lock for too long.

The files say whether their output may be removed. If they are not sealed, the job has not ended.
The service itself may know better: a full disk may have refused the seal, and then this output has
to be removed to make room. Output that a process reads is locked (flock(2), shared), also against
`worker prune`, which is a process of its own. Both kinds stay until a later attempt.

Output is missing if it is not there and has no mark of a removal (`output.directory`). Missing
output counts for nothing, and is included again when it is back. Output that is there but cannot be
read counts for nothing either. The log names it once, and it does not stop the removal of other
output.
"""

import logging
import os
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from attrs import define, field

from jobworker.errors import Busy, JobworkerError, NotFound, OutOfDescriptors, OutputError
from jobworker.jobs.age_clock import TOLERANCE_NS
from jobworker.jobs.output.directory import clear_mark, disk_errors, marked_job, was_removed
from jobworker.jobs.output.ended import describe_output, remove_output, seal_output
from jobworker.jobs.retention_policy import EndedOutput
from jobworker.model.job import JobId
from jobworker.sandbox.channel import close_all

log = logging.getLogger("jobworker.jobs")

_MAX_DIGITS = 16
"""The most digits of a job's id."""


@define(eq=False)
class KeptOutput:
    """The output of the ended jobs of one spool directory.

    Its methods wait for the disk: call them in a thread, one at a time.
    """

    _spools: Path
    _seals: bool = False
    """Whether this process is the service, which knows that a job has ended though its output is
    not sealed."""
    _clock_ns: Callable[[], int] = time.time_ns
    """The time by which output is old, in ns since the epoch."""
    _steady_ns: Callable[[], int] | None = None
    """The time of an end, in ns since the epoch. The index may have another one, if the time of day
    was set back."""
    _count: Callable[[int, int], None] = lambda _size, _was_live: None
    """Called at each change, with how many bytes more are kept (negative: fewer), and how many
    bytes were counted for the job while it lived."""
    _close: Callable[[Sequence[int]], None] = close_all
    """Closes the files of removed output."""
    _kept: dict[JobId, EndedOutput] = field(factory=dict, init=False)
    _order: list[tuple[int, JobId]] = field(factory=list, init=False)
    """The time of the end and the job of each entry, sorted."""
    _size: int = field(default=0, init=False)
    """The bytes of all entries."""
    _owners: dict[JobId, str] = field(factory=dict, init=False)
    """The owners of jobs, as far as they are known."""
    _sizes: dict[str, int] = field(factory=dict, init=False)
    """The bytes of all entries of each owner."""
    _numbers: Counter[str] = field(factory=Counter, init=False)
    """The number of entries of each owner."""
    dropped: int = field(default=0, init=False)
    """How many entries were dropped so far, whoever has removed the output."""
    _ending: dict[JobId, int] = field(factory=dict, init=False)
    """Jobs that have just ended and have no entry yet, with the bytes counted while they lived."""
    _missing: set[JobId] = field(factory=set, init=False)
    """Ended jobs whose output is not there and was not removed by this program."""
    _unreadable: set[JobId] = field(factory=set, init=False)
    """Ended jobs whose output is there and cannot be read. Each look tries again."""

    @property
    def all(self) -> Mapping[JobId, EndedOutput]:
        """The output that is kept, by job."""
        return self._kept

    @property
    def last(self) -> tuple[int, JobId]:
        """The time of the last end, in ns since the epoch, and its job; 0 if no output is kept."""
        return self._order[-1] if self._order else (0, JobId(0))

    def now_ns(self) -> int:
        """The time by which output is old, in ns since the epoch."""
        return self._clock_ns()

    def owner_of(self, job: JobId) -> str:
        """The owner of a job; "" if that is not known."""
        return self._owners.get(job, "")

    def size_of(self, owner: str | None) -> int:
        """The bytes of an owner's output; None: of all. May be called in any thread."""
        return self._size if owner is None else self._sizes.get(owner, 0)

    def number_of(self, owner: str | None) -> int:
        """The number of an owner's jobs whose output is kept; None: of all jobs."""
        return len(self._kept) if owner is None else self._numbers[owner]

    def load(
        self, live: Container[JobId] = (), owners: Mapping[JobId, str] = MappingProxyType({})
    ) -> None:
        """Make entries for the directory's output. Ignores all that is no ended job's output.

        `live`: jobs that have not ended. `owners`: the owners of the jobs that have output by the
        history. Raises OutputError, OutOfDescriptors.
        """
        self._owners.update(owners)
        names = self._names()
        for job in sorted(int(name) for name in names if name.isascii() and name.isdigit()):
            if job not in live:  # in this order most ends are sorted: `_order` grows at its end
                self.add(JobId(job))

    def add(self, job: JobId) -> None:
        """Make the entry of a job that ended before, if it left output. Raises OutOfDescriptors."""
        self._set(job, self._measure(job))

    def end(self, job: JobId, live_bytes: int = 0, owner: str = "") -> None:
        """Make the entry of a job that has just ended.

        `live_bytes`: how many bytes the budget has counted while it lived. If no file descriptor is
        left, the next `look` makes the entry.
        """
        self._owners[job] = owner
        self._ending[job] = live_bytes
        with suppress(OutOfDescriptors):
            self._take_up_ended()

    def _take_up_ended(self) -> None:
        for job in list(self._ending):
            self._set(job, self._measure(job, ends_now=True))

    def _set(self, job: JobId, kept: EndedOutput | None) -> None:
        """Set or remove the entry of a job. Only this method changes the counts, in the same step.

        `kept` is None if there is no output.
        """
        before = self._kept.pop(job, None)
        if before is not None:
            del self._order[bisect_left(self._order, (before.ended_ns, job))]
        if kept is not None:
            self._kept[job] = kept
            insort(self._order, (kept.ended_ns, job))
        elif before is not None:
            self.dropped += 1
        more = (kept.size if kept else 0) - (before.size if before else 0)
        self._size += more
        owner = self.owner_of(job)
        self._sizes[owner] = self._sizes.get(owner, 0) + more
        self._numbers[owner] += (kept is not None) - (before is not None)
        if not self._numbers[owner]:
            del self._sizes[owner], self._numbers[owner]
        self._count(more, self._ending.pop(job, 0))

    def _measure(self, job: JobId, *, ends_now: bool = False) -> EndedOutput | None:
        """The output of an ended job by its files; None without any. Raises OutOfDescriptors."""
        directory = self._spools / str(job)
        try:
            if self._seals:  # a full disk may have refused the seal at the job's end
                # Busy: a process reads it. NotFound: a part of it is gone, and the rest must go.
                with suppress(Busy, NotFound):
                    seal_output(directory, ends_now=ends_now)
            ended_ns, size = describe_output(directory, ended=self._seals)
        except OutOfDescriptors:
            raise
        except NotFound:
            self._unreadable.discard(job)
            if ends_now:
                self._missing.add(job)
            return None
        except (OutputError, OSError) as error:
            if job not in self._unreadable:
                self._unreadable.add(job)
                log.warning("job %d: its output counts for nothing, and stays: %s", job, error)
            return None
        except JobworkerError:
            return None  # the job lives
        self._unreadable.discard(job)
        with suppress(OSError):
            ended_ns = max(ended_ns, self._second_witness(directory, ended_ns, ends_now))
        return EndedOutput(job, ended_ns, size)

    def _second_witness(self, directory: Path, ended_ns: int, ends_now: bool) -> int:
        """The time of the directory's last change, in ns: a lower bound for the time of the end.

        If a job ends while the time of day is set back, this method corrects the directory's time.
        Otherwise the output would seem old as soon as the time of day is right again.
        """
        if ends_now and self._steady_ns is not None:
            now_ns = self._steady_ns()
            if ended_ns < now_ns - TOLERANCE_NS:
                os.utime(directory, ns=(now_ns, now_ns), follow_symlinks=False)
        return directory.stat(follow_symlinks=False).st_mtime_ns

    def remove(self, job: JobId, *, force: bool = False) -> int:
        """Remove a job's output. Returns how many bytes it had; 0 if there was none.

        Raises Busy if the output is being written or read, and OutputError. With `force` it is
        removed while it is being read: readers go on to its end.
        """
        try:
            freed = remove_output(
                self._spools / str(job), force=force, ended=self._seals, close=self._close
            )
        except NotFound:  # another process, or an administrator, was faster
            freed = self._kept[job].size if job in self._kept else 0
            self.drop(job, removed=self._was_removed(job))
        else:
            self.drop(job, removed=True)
        return freed

    def misses(self, job: JobId) -> bool:
        """Whether a job's output is not there and was not removed by this program."""
        return job in self._missing

    @property
    def missing(self) -> int:
        """The number of ended jobs for which `misses` is true."""
        return len(self._missing)

    def expect(self, jobs: Iterable[JobId]) -> None:
        """Count those of `jobs` without a directory as missing, until their output is there.

        Raises OutputError, OutOfDescriptors.
        """
        names = self._names()
        self._missing.update(job for job in jobs if str(job) not in names)

    def look(self) -> list[JobId]:
        """Compare the entries with the directory: drop some, make others again.

        Returns the jobs for which the directory has the name of a mark, for `find_removed`: there
        may be many. Raises OutputError, OutOfDescriptors.
        """
        self._take_up_ended()
        names = self._names()
        marked = {
            JobId(int(job))
            for job in map(marked_job, names)
            if job.isascii() and job.isdigit() and len(job) <= _MAX_DIGITS
        }
        gone = [job for job in self._kept if str(job) not in names and job not in marked]
        for job in gone:
            self.drop(job, removed=False)
        lost = {job for job in self._unreadable if str(job) not in names} - marked
        self._missing |= lost
        self._unreadable -= lost
        for job in [job for job in self._missing | self._unreadable if str(job) in names]:
            self.add(job)
            self._missing.discard(job)
        return sorted(marked)

    def find_removed(self, jobs: Iterable[JobId]) -> list[JobId]:
        """Those of `jobs` whose output was removed and is not there. Drops their entries.

        `jobs`: of `look`. Removes a mark whose output was put back.
        """
        removed = list[JobId]()
        for job in jobs:
            if self._was_removed(job):
                self.drop(job, removed=True)
                removed.append(job)
            elif os.path.lexists(self._spools / str(job)):
                clear_mark(self._spools / str(job))
            elif job in self._kept or job in self._unreadable:
                self.drop(job, removed=False)
        return removed

    def _was_removed(self, job: JobId) -> bool:
        """See `was_removed`. If the disk cannot tell, the output counts as missing."""
        try:
            return was_removed(self._spools / str(job))
        except OutputError:
            return False

    def _names(self) -> set[str]:
        """All names in the directory. For the service, none if the directory is missing."""
        with disk_errors("look for"):
            try:
                with os.scandir(self._spools) as entries:
                    return {entry.name for entry in entries}
            except FileNotFoundError:
                if not self._seals:
                    raise
                return set()

    def drop(self, job: JobId, *, removed: bool) -> None:
        """Drop the entry of a job. Its output counts as `removed`, or else as missing."""
        self._set(job, None)
        self._unreadable.discard(job)
        if removed:
            self._missing.discard(job)
        else:
            self._missing.add(job)

    def forget(self, jobs: Iterable[JobId]) -> None:
        """Forget these jobs: the history has the removals of their output."""
        for job in jobs:
            self.drop(job, removed=True)
            self._owners.pop(job, None)

    def next_after(self, position: tuple[int, JobId]) -> EndedOutput | None:
        """The output whose end comes next after `position`, an end in ns and its job."""
        place = bisect_right(self._order, position)
        return self._kept[self._order[place][1]] if place < len(self._order) else None

    def try_removal(self, job: JobId) -> bool:
        """Remove a job's output, if nothing prevents that. Returns whether it was removed now.

        The entry of output that cannot be read is dropped until it can be read. Raises
        OutOfDescriptors.
        """
        try:
            remove_output(self._spools / str(job), ended=self._seals, close=self._close)
        except NotFound:  # another process may have been faster
            self.drop(job, removed=self._was_removed(job))
        except OutputError:
            self.add(job)  # the entry stays, for another attempt, if the output can be read
        except JobworkerError:
            pass  # a process reads it: another attempt follows
        else:
            self._set(job, None)
            return True
        return False
