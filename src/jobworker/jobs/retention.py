"""Retention: which ended jobs' output is kept, and the removal of the rest.

The policy (`retention_policy`) chooses among entries: one `EndedOutput` for each ended job whose
output is on the disk. The entries are read from the directories when the service starts and are
kept up to date from then on, in the order of the ends. There may be 100,000 of them. So, except at
the start, no single call of a C function goes through all of them, since it would keep the
interpreter's lock for too long.

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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from attrs import define, field, frozen

from jobworker.errors import Busy, JobworkerError, NotFound, OutOfDescriptors, OutputError
from jobworker.jobs.age_clock import TOLERANCE_NS
from jobworker.jobs.output.directory import clear_mark, disk_errors, marked_job, was_removed
from jobworker.jobs.output.ended import describe_output, remove_output, seal_output
from jobworker.jobs.retention_policy import EndedOutput, RetentionPolicy, choose
from jobworker.model.job import JobId

log = logging.getLogger("jobworker.jobs")

_MAX_DIGITS = 16
"""The most digits of a job's id."""


@frozen
class DirectoryChanges:
    """What another process or an administrator has done to the directory since the last look."""

    marked: frozenset[JobId]
    """The jobs with the mark of a removal. The history may not have recorded it."""
    gone: list[EndedOutput]
    """The output that is not there any more, for whatever reason."""


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
    _kept: dict[JobId, EndedOutput] = field(factory=dict, init=False)
    _order: list[tuple[int, JobId]] = field(factory=list, init=False)
    """The time of the end and the job of each entry, sorted."""
    _size: int = field(default=0, init=False)
    """The bytes of all entries."""
    _owners: dict[JobId, str] = field(factory=dict, init=False)
    """The owners of jobs, as far as they are known."""
    _sizes: dict[str, int] = field(factory=dict, init=False)
    """The bytes of all entries of each owner."""
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
    def newest_ns(self) -> int:
        """The time of the last end, in ns since the epoch; 0 if no output is kept."""
        return self._order[-1][0] if self._order else 0

    def size_of(self, owner: str) -> int:
        """The bytes of an owner's output. May be called at any time, in any thread."""
        return self._sizes.get(owner, 0)

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
        owner = self._owners.get(job, "")
        self._sizes[owner] = self._sizes.get(owner, 0) + more
        if not self._sizes[owner]:
            del self._sizes[owner]
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
            freed = remove_output(self._spools / str(job), force=force, ended=self._seals)
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

    def look(self) -> DirectoryChanges:
        """Compare the entries with the directory: drop some, make others again. Returns changes.

        Raises OutputError, OutOfDescriptors.
        """
        self._take_up_ended()
        names = self._names()
        marked = self._marked(names)
        gone = [kept for job, kept in self._kept.items() if str(job) not in names]
        for kept in gone:
            self._set(kept.job, None)
        self._missing.update(kept.job for kept in gone)
        self._missing.update(job for job in self._unreadable if str(job) not in names)
        self._missing -= marked
        for job in [job for job in self._missing | self._unreadable if str(job) in names]:
            self.add(job)
            self._missing.discard(job)
        self._unreadable -= self._missing | marked
        return DirectoryChanges(marked, gone)

    def _marked(self, names: Iterable[str]) -> frozenset[JobId]:
        """The jobs with the mark of a removal. Removes a mark whose output was put back."""
        marked = set[JobId]()
        for job in map(marked_job, names):
            if job.isascii() and job.isdigit() and len(job) <= _MAX_DIGITS:
                if self._was_removed(JobId(int(job))):
                    marked.add(JobId(int(job)))
                elif os.path.lexists(self._spools / job):
                    clear_mark(self._spools / job)
        return frozenset(marked)

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

    def clear_marks(self, jobs: Iterable[JobId]) -> None:
        """Remove the marks of these jobs, and forget the jobs. The history has the removals."""
        for job in jobs:
            self.drop(job, removed=True)
            clear_mark(self._spools / str(job))
            self._owners.pop(job, None)

    def prune(
        self,
        policy: RetentionPolicy,
        *,
        only: Callable[[JobId], bool] | None = None,
        live_bytes: int = 0,
    ) -> list[EndedOutput]:
        """Remove the output that `policy` does not keep. Returns what was removed.

        `only`: which jobs' output may be removed, and counts; None: all. `live_bytes`: the output
        of live jobs. The entry of output that cannot be read is dropped until it can be read.
        """
        gone, tried = list[EndedOutput](), set[JobId]()

        def goes(each: EndedOutput) -> bool:
            if each.job not in tried:  # a failed removal may have given the entry a later end
                tried.add(each.job)
                with suppress(OutOfDescriptors):  # the next call tries again
                    if self._removes(each.job):
                        gone.append(each)
            return each.job not in self._kept

        number, size = len(self._kept), self._size
        if only is not None:
            sizes = [each.size for each in self._oldest_first(only)]
            number, size = len(sizes), sum(sizes)
        choose(
            self._oldest_first(only),
            policy,
            number=number,
            size=live_bytes + size,
            now_ns=self._clock_ns(),
            goes=goes,
        )
        return gone

    def _oldest_first(self, only: Callable[[JobId], bool] | None) -> Iterator[EndedOutput]:
        """Yield the entries of the jobs for which `only` is true. Entries may go meanwhile."""
        last = (-1, JobId(0))
        while (position := bisect_right(self._order, last)) < len(self._order):
            last = self._order[position]
            if only is None or only(last[1]):
                yield self._kept[last[1]]

    def _removes(self, job: JobId) -> bool:
        """Remove a job's output, if nothing prevents that. Returns whether it was removed now."""
        try:
            remove_output(self._spools / str(job), ended=self._seals)
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
