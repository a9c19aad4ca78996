"""Retention: which ended jobs' output is kept, and the removal of the rest.

`choose` is the policy, pure: the oldest ends go first, until age, number and size are within their
bounds. `EndedOutput` is what it chooses among: a line for each ended job whose output is on the
disk, read from the directories at start and kept up to date from then on, in the order of the ends.
There may be 100,000: but for the start, nothing here goes through all of them in one call of C's,
which would keep the interpreter's lock.

The disk has the last word about what may go. Output that is not sealed is a job's that has not
ended, but where the service itself knows better: a full disk may refuse the seal, and its output
must go for there to be room. Output that somebody reads is locked (flock(2), shared), also against
`worker prune` in a process of its own. Both are left for a later time.

What is not there any more and has no mark of a removal (`output.directory`) is missing: it counts
for nothing, and is taken up again when it is back. So does what is there and cannot be read: it is
passed over, the log names it once, and nothing else waits for it.
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
from jobworker.model.job import JobId

log = logging.getLogger("jobworker.jobs")

_MAX_DIGITS = 16
"""No job's id has more."""


@frozen
class EndedOutput:
    """An ended job's output on the disk."""

    job: JobId
    ended_ns: int
    size: int
    """Bytes of its three files."""


@frozen
class DirectoryChanges:
    """What another process, or another hand, has done to the directory since the last look."""

    marked: frozenset[JobId]
    """Those that have the mark of a removal, which the history may not have noted."""
    gone: list[EndedOutput]
    """Those that are not there any more, for whichever reason."""


@frozen(kw_only=True)
class RetentionPolicy:
    """What is kept; None is no bound."""

    max_age_seconds: float | None = None
    max_jobs: int | None = None
    max_bytes: int | None = None
    """Of all output, that of live jobs included."""


def choose(
    oldest_first: Iterable[EndedOutput],
    policy: RetentionPolicy,
    *,
    number: int,
    size: int,
    now_ns: int,
    goes: Callable[[EndedOutput], bool],
) -> None:
    """Have go what `policy` does not keep, the oldest end first.

    `number` and `size` are of all that counts. `goes` removes output, if it can: whether it counts
    no more. What cannot go takes room all the same, and where that is short the next goes in its
    place; by number it counts as gone.
    """
    for each in oldest_first:
        age_ns = now_ns - each.ended_ns
        too_old = policy.max_age_seconds is not None and age_ns > policy.max_age_seconds * 1e9
        too_many = policy.max_jobs is not None and number > policy.max_jobs
        too_large = policy.max_bytes is not None and size > policy.max_bytes
        if not (too_old or too_many or too_large):
            break
        number -= 1
        if goes(each):
            size -= each.size


@define(eq=False)
class KeptOutput:
    """All of one spool directory. Its calls wait for the disk: bring a thread, one at a time."""

    _spools: Path
    _seals: bool = False
    """Whether whoever writes is in this process: what is taken up has ended then, sealed or not."""
    _clock_ns: Callable[[], int] = time.time_ns
    _steady_ns: Callable[[], int] | None = None
    """When a job that ends now ends; its own records may say otherwise, by a clock set back."""
    _count: Callable[[int, int], None] = lambda _size, _was_live: None
    """Told with each change how many more bytes are kept, or fewer, and how many of a job were
    counted while it lived."""
    _kept: dict[JobId, EndedOutput] = field(factory=dict, init=False)
    _order: list[tuple[int, JobId]] = field(factory=list, init=False)
    """The end and the job of each, sorted."""
    _size: int = field(default=0, init=False)
    """Of all of it."""
    _owners: dict[JobId, str] = field(factory=dict, init=False)
    """Whose jobs these are, as far as that was told."""
    _sizes: dict[str, int] = field(factory=dict, init=False)
    """Of what is kept, by owner."""
    dropped: int = field(default=0, init=False)
    """How often something was kept no more, by whichever hand."""
    _ending: dict[JobId, int] = field(factory=dict, init=False)
    """Jobs that have just ended and are not taken up yet, with what was counted of each."""
    _missing: set[JobId] = field(factory=set, init=False)
    """Ended jobs whose output was or should be there, is not, and was not removed by us."""
    _unreadable: set[JobId] = field(factory=set, init=False)
    """Ended jobs whose output is there and cannot be read: each look tries again."""

    @property
    def all(self) -> Mapping[JobId, EndedOutput]:
        """What is kept, by job."""
        return self._kept

    @property
    def newest_ns(self) -> int:
        """When the last job ended, in ns since the epoch; 0 where nothing is kept."""
        return self._order[-1][0] if self._order else 0

    def size_of(self, owner: str) -> int:
        """The bytes of an owner's output. May be asked at any time, in any thread."""
        return self._sizes.get(owner, 0)

    def load(
        self, live: Container[JobId] = (), owners: Mapping[JobId, str] = MappingProxyType({})
    ) -> None:
        """Read what stands in the directory; what is no ended job's output is passed over.

        `owners` are those of the jobs whose output the history knows of. Raises OutputError,
        OutOfDescriptors.
        """
        self._owners.update(owners)
        names = self._names()
        for job in sorted(int(name) for name in names if name.isascii() and name.isdigit()):
            if job not in live:  # in this order, most come behind those before them
                self.add(JobId(job))

    def add(self, job: JobId) -> None:
        """Take up a job that ended before, where it left output. Raises OutOfDescriptors."""
        self._set(job, self._measure(job))

    def end(self, job: JobId, live_bytes: int = 0, owner: str = "") -> None:
        """Take up a job that has just ended, of which so much was counted while it lived.

        Where descriptors are short, the next `look` does.
        """
        self._owners[job] = owner
        self._ending[job] = live_bytes
        with suppress(OutOfDescriptors):
            self._take_up_ended()

    def _take_up_ended(self) -> None:
        for job in list(self._ending):
            self._set(job, self._measure(job, ends_now=True))

    def _set(self, job: JobId, kept: EndedOutput | None) -> None:
        """Change what is kept of a job; what is counted changes in the same step, and only here."""
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
        """What a job has left that may be removed. Raises OutOfDescriptors."""
        directory = self._spools / str(job)
        try:
            if self._seals:  # what a full disk refused at the job's end
                # It is being read, and was refused; or part of it is gone, and the rest must go.
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
            return None  # live: nothing that may be removed
        self._unreadable.discard(job)
        with suppress(OSError):
            ended_ns = max(ended_ns, self._second_witness(directory, ended_ns, ends_now))
        return EndedOutput(job, ended_ns, size)

    def _second_witness(self, directory: Path, ended_ns: int, ends_now: bool) -> int:
        """When a directory was changed last, which no end comes before.

        Where a job ends while the clock is set back, that is set right: or its output would be old
        as soon as the clock is right again.
        """
        if ends_now and self._steady_ns is not None:
            now_ns = self._steady_ns()
            if ended_ns < now_ns - TOLERANCE_NS:
                os.utime(directory, ns=(now_ns, now_ns), follow_symlinks=False)
        return directory.stat(follow_symlinks=False).st_mtime_ns

    def remove(self, job: JobId, *, force: bool = False) -> int:
        """Remove a job's output: the bytes that it had, 0 where there was none.

        Raises Busy where it is written, or read (not with `force`: readers go on to its end), and
        OutputError.
        """
        try:
            freed = remove_output(self._spools / str(job), force=force, ended=self._seals)
        except NotFound:  # gone by another hand
            freed = self._kept[job].size if job in self._kept else 0
            self.drop(job, removed=self._was_removed(job))
        else:
            self.drop(job, removed=True)
        return freed

    def misses(self, job: JobId) -> bool:
        """Whether a job's output is not there, and was not removed by us."""
        return job in self._missing

    @property
    def missing(self) -> int:
        """The number of ended jobs whose output is not there and was not removed by us."""
        return len(self._missing)

    def expect(self, jobs: Iterable[JobId]) -> None:
        """Count those of `jobs` that were not taken up as missing, until they are there.

        Raises OutputError, OutOfDescriptors.
        """
        names = self._names()
        self._missing.update(job for job in jobs if str(job) not in names)

    def look(self) -> DirectoryChanges:
        """Drop what is not there any more, and take up what is there again.

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
        """The jobs that have the mark of a removal; one beside output that was put back goes."""
        marked = set[JobId]()
        for job in map(marked_job, names):
            if job.isascii() and job.isdigit() and len(job) <= _MAX_DIGITS:
                if self._was_removed(JobId(int(job))):
                    marked.add(JobId(int(job)))
                elif os.path.lexists(self._spools / job):
                    clear_mark(self._spools / job)
        return frozenset(marked)

    def _was_removed(self, job: JobId) -> bool:
        """See `was_removed`; where that cannot be told, the output is missing."""
        try:
            return was_removed(self._spools / str(job))
        except OutputError:
            return False

    def _names(self) -> set[str]:
        """What stands in the directory: nothing where it is missing itself."""
        with disk_errors("look for"):
            try:
                with os.scandir(self._spools) as entries:
                    return {entry.name for entry in entries}
            except FileNotFoundError:
                if not self._seals:
                    raise
                return set()

    def drop(self, job: JobId, *, removed: bool) -> None:
        """Count the output of a job as removed, or as missing."""
        self._set(job, None)
        self._unreadable.discard(job)
        if removed:
            self._missing.discard(job)
        else:
            self._missing.add(job)

    def clear_marks(self, jobs: Iterable[JobId]) -> None:
        """Forget that the output of these jobs was removed or missing: the history knows."""
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
        """Remove what `policy` does not keep of the jobs that `only` names: what went.

        What cannot be read is dropped: it counts for nothing until it can be.
        """
        gone, tried = list[EndedOutput](), set[JobId]()

        def goes(each: EndedOutput) -> bool:
            if each.job not in tried:  # what failed may have made its end a later one
                tried.add(each.job)
                with suppress(OutOfDescriptors):  # another time
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
        """What is kept, of the jobs that `only` names; any of it may go meanwhile."""
        last = (-1, JobId(0))
        while (position := bisect_right(self._order, last)) < len(self._order):
            last = self._order[position]
            if only is None or only(last[1]):
                yield self._kept[last[1]]

    def _removes(self, job: JobId) -> bool:
        """Remove a job's output, unless something is in the way: whether it went now."""
        try:
            remove_output(self._spools / str(job), ended=self._seals)
        except NotFound:  # another process may have been faster
            self.drop(job, removed=self._was_removed(job))
        except OutputError:
            self.add(job)  # it stays what is kept, for another time, where it can be read
        except JobworkerError:
            pass  # followed: another time
        else:
            self._set(job, None)
            return True
        return False
