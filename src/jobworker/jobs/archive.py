"""The archive: ended jobs' output, kept by policy, removed by policy or on request.

The archive applies the policy at the start, when a job ends, from time to time (since output gets
older), and when live jobs need more space than the limit on all output leaves. It records a removal
in the job's record, which stays. Only `remove` removes a job altogether. `worker prune` removes
output too, in a process of its own: the archive records that at its start, when it applies the
policy, and when a client asks for the job.

Output without a directory and without the mark of a removal is missing: its disk may not be
mounted, or an administrator has moved or deleted the directory. A client that asks for the job is
told so, but no record changes: the output may come back with the directory.

If a full disk refuses the record of a job's end, the archive takes the job all the same: its output
may have to be removed so that the disk has space again (`removal_records`).

A policy is applied in portions (`sweep`), and the archive records what each has removed. A task
that waits for the lock or the thread goes before the next portion. So a job that ends gives its
place back soon, and the end of the service waits for one portion.
"""

import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio
from attrs import define, evolve, field

from jobworker.errors import JobworkerError, NotFound
from jobworker.jobs.age_clock import FILE, AgeClock
from jobworker.jobs.execution import Execution
from jobworker.jobs.history.history import History
from jobworker.jobs.open_outputs import OpenOutputs
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.output.directory import clear_marks, disk_errors, was_removed
from jobworker.jobs.output.mover import OutputRoom
from jobworker.jobs.output.pace import OutputPace
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.removal_records import RemovalRecords
from jobworker.jobs.retention import KeptOutput
from jobworker.jobs.retention_policy import EndedOutput, RetentionPolicy
from jobworker.jobs.sweep import PORTION_JOBS, Sweep
from jobworker.model.job import JobId, JobRecord, Stream
from jobworker.sandbox.channel import close_all
from jobworker.threads import in_thread

T = TypeVar("T")

log = logging.getLogger("jobworker.jobs")

MISSING = "its output is missing on the server"
SWEEP_SECONDS = 300.0
"""The longest time between two applications of the policy."""
PAUSE_SECONDS = 1.0
"""The shortest time between two of them: many jobs may end at once."""
HEADROOM = 0.9
"""If space is short, output is removed down to this part of the limit, so that not every write has
to look for space."""
LARGE_BYTES = 16 << 20
"""To close a removed file of this size may take ext4 a millisecond; the archive's thread leaves it
to another one."""


@define(eq=False, kw_only=True)
class Archive:
    """The ended jobs of one spool directory."""

    _spools: Path
    _history: History
    _policy: RetentionPolicy
    budget: OutputBudget
    _clock: Callable[[], datetime]
    _max_open: int = 1024
    """The most outputs of ended jobs that are open at a time; each has three descriptors."""
    _outputs: OpenOutputs = field(init=False)
    _kept: KeptOutput = field(init=False)
    _ages: AgeClock = field(init=False)
    _live: set[JobId] = field(factory=set, init=False)
    """Jobs that have not ended, or that `add` has not taken yet. The archive leaves their output
    and records alone."""
    _records: RemovalRecords = field(init=False)
    _removing: trio.Lock = field(factory=trio.Lock, init=False)
    """Held while output is removed and records are changed: otherwise the record of a removal could
    bring a removed job back."""
    _missing_told: int = field(default=0, init=False)
    """The number of missing outputs that the log has named last."""
    _due: trio.Event = field(factory=trio.Event, init=False)
    _thread: trio.CapacityLimiter = field(factory=lambda: trio.CapacityLimiter(1), init=False)
    """Admits one thread to `_kept`. Jobs that end wait for it."""
    _clearing: trio.CapacityLimiter = field(factory=lambda: trio.CapacityLimiter(1), init=False)
    """Admits one thread that removes the marks of a sweep: rmdir(2) may take 3 ms for each."""
    _large: list[int] = field(factory=list, init=False)
    """Removed large files that are to be closed."""
    _pace: OutputPace = field(factory=OutputPace, init=False)

    def __attrs_post_init__(self) -> None:
        self._outputs = OpenOutputs(self._max_open)
        self._records = RemovalRecords(self._history)
        self._ages = AgeClock(self._spools.with_name(FILE))
        self._kept = KeptOutput(
            self._spools,
            seals=True,
            clock_ns=self._ages.now_ns,
            steady_ns=self._ages.steady_ns,
            count=self.budget.keep,
            close=self._close_removed,
        )

    def room_of(self, owner: str) -> OutputRoom:
        """The resources that the live jobs of an owner share for their output."""
        return OutputRoom(
            owner=owner, budget=self.budget, pace=self._pace, make_room=self.make_room
        )

    async def load(self, live: Collection[JobId] = ()) -> None:
        """Take the output in the directory, except that of `live` jobs, and apply the policy.

        Raises InternalError, OutputError, OutOfDescriptors.
        """
        self._live.update(live)
        with_output = await self._history.with_output()
        await self._in_thread(partial(self._kept.load, live, with_output))
        await self._in_thread(partial(self._ages.begin, self._kept.last[0]))
        await self._in_thread(partial(self._kept.expect, with_output))
        await self.prune()

    def leave_alone(self, job: JobId) -> None:
        """Record no removal of a job's output until `add`: its execution may write the record."""
        self._live.add(job)

    def size_of(self, owner: str) -> int:
        """The bytes of output of an owner's ended jobs."""
        return self._kept.size_of(owner)

    def count_live(self, spool: Spool) -> None:
        """Count the output that a job has written under an earlier service.

        To be called before the job goes on.
        """
        spool.counted_bytes = spool.written_bytes + spool.index_bytes
        self.budget.count(spool.counted_bytes)

    async def serve(self) -> None:
        """Apply the policy whenever that may change something. Never returns."""
        while True:
            with trio.move_on_after(SWEEP_SECONDS):
                await self._due.wait()
            self._due = trio.Event()
            await self.prune()
            await trio.sleep(PAUSE_SECONDS)

    async def add(self, execution: Execution) -> None:
        """Take a job that has just ended, whether its end is recorded or not.

        Until `forget`, its execution has its record.
        """
        job = execution.record.id
        self._records.take(execution)
        self._live.discard(job)
        self._outputs.count_followed(execution.spool, execution.record.owner)
        try:
            with trio.CancelScope(shield=True):  # waits only for the disk
                owner, counted = execution.record.owner, execution.spool.counted_bytes
                await self._in_thread(partial(self._kept.end, job, counted, owner))
        finally:
            execution.archived.set()
            self._due.set()

    def forget(self, execution: Execution) -> None:
        """From now on the history alone has the record of this job."""
        self._records.forget(execution.record.id)
        if execution.record.output_removed_at is not None:
            self._due.set()  # the mark may go now

    async def look_after(self, record: JobRecord) -> JobRecord:
        """The record of a job, which tells if the output of an ended job was removed or is missing.

        Raises NotFound if the job was removed since `record` was read, OutputError, and
        OutOfDescriptors.
        """
        if not record.ended or record.output_removed_at is not None:
            return record
        directory = self._spools / str(record.id)
        if await in_thread(_exists, directory):
            return record
        async with self._alone():
            return await self._look_for_output(record, directory)

    async def _look_for_output(self, record: JobRecord, directory: Path) -> JobRecord:
        """As `look_after`, for a directory that is not there; within `_alone`."""
        job = record.id
        if job not in self._live:
            record = await self._records.latest(job)
        # Look for the mark after the directory: `worker prune` may rename it between the two.
        if record.output_removed_at is not None or await in_thread(_exists, directory):
            return record
        removed, when = await in_thread(was_removed, directory), self._clock()
        if job not in self._live:  # for a live job `add` does this
            await self._in_thread(partial(self._kept.drop, job, removed=removed))
            if removed:
                await self._clear(await self._records.note([job], when) or ())
        if removed:
            return evolve(record, output_removed_at=when)
        return evolve(record, detail="; ".join(filter(None, (record.detail, MISSING))))

    def reading(self, record: JobRecord) -> AbstractAsyncContextManager[Spool]:
        """Open an ended job's output, for the block and as long as a follower reads it.

        Raises TooManyFollows (`OpenOutputs`), and NotFound if the output was removed or is missing.
        """
        return self._outputs.reading(record, partial(self._open_spool, record))

    async def _open_spool(self, record: JobRecord) -> Spool:
        directory = self._spools / str(record.id)
        written = {Stream.STDOUT: record.stdout_bytes, Stream.STDERR: record.stderr_bytes}
        try:
            spool = await in_thread(Spool.open_ended, directory, written)
        except NotFound:  # the output may have been removed after `record` was read
            when = (await self.look_after(record)).output_removed_at
            if when is None:
                raise NotFound(
                    f"cannot read the output of job {record.id}: {MISSING}; no request and no rule "
                    "has removed it",
                    remedy=f"see whether {self._spools} is mounted, or put {record.id} back there",
                ) from None
            raise NotFound(
                f"cannot read the output of job {record.id}: it is not kept any more since "
                f"{when:%Y-%m-%d %H:%M} UTC; "
                "it was removed on request or by the rules of the configuration",
                remedy="run the command again; the rules are worker.keep_output_age, "
                "keep_output_jobs and max_total_output",
            ) from None
        if spool.missing:
            log.warning("job %d: %s are missing in %s", record.id, spool.missing, directory)
        return spool

    async def make_room(self) -> bool:
        """Remove old output so that live jobs can go on. Returns whether there is space now.

        Another call may have made the space while this one waited for the lock. Raises OutputError,
        OutOfDescriptors.
        """
        goal = max(1, int(self.budget.max_bytes * HEADROOM))
        before = self._kept.dropped
        await self._sweep(evolve(self._policy, max_bytes=goal), None)
        return self._kept.dropped > before or self.budget.used_bytes < self.budget.max_bytes

    async def prune(
        self, policy: RetentionPolicy | None = None, *, owner: str | None = None
    ) -> Sequence[EndedOutput]:
        """Remove the output that a policy does not keep. Returns what was removed.

        `policy`: None is the configured one. `owner`: only this owner's jobs; None: all. Output
        that is being followed stays. If this is cancelled, the portion under way is finished.
        Raises OutputError, OutOfDescriptors.
        """
        return await self._sweep(policy or self._policy, owner)

    async def _sweep(self, policy: RetentionPolicy, owner: str | None) -> list[EndedOutput]:
        """Apply a policy, and record all removals, also those of other processes."""
        late = list[JobId]()
        async with self._alone():
            marked = await self._in_thread(self._kept.look)
        for start in range(0, len(marked), PORTION_JOBS):
            part = marked[start : start + PORTION_JOBS]
            await self._portion(partial(self._kept.find_removed, part), late)
        begin = partial(
            Sweep,
            kept=self._kept,
            policy=policy,
            owner=owner,
            live_bytes=lambda: self.budget.live_bytes,
        )
        sweep = await self._in_thread(begin)
        self._log_missing()
        try:
            while not sweep.is_over:
                await self._portion(sweep.portion, late)
        finally:
            if sweep.gone:
                log.info("removed the output of %d jobs", len(sweep.gone))
        while late:  # the removals may have made room for the records
            part, refused = late[:PORTION_JOBS], list[JobId]()
            del late[:PORTION_JOBS]
            await self._portion(part.copy, refused)
            if refused:
                break
        return sweep.gone

    async def _portion(self, work: Callable[[], Sequence[JobId]], late: list[JobId]) -> None:
        """Call `work`, which removes output or finds removed output, and record the removals.

        Adds the jobs to `late` if the disk refuses the record, or has refused an earlier one.
        """
        settled: Collection[JobId] | None = ()
        async with self._alone():
            removed = [job for job in await self._in_thread(work) if job not in self._live]
            if removed and not late:
                settled = await self._records.note(removed, self._clock())
            if late or settled is None:
                late += removed
            if settled:
                await self._in_thread(partial(self._kept.forget, settled))
        if settled:  # a mark whose removal is recorded may stay for a while: nobody waits for this
            with trio.CancelScope(shield=True):
                await in_thread(clear_marks, self._spools, settled, limiter=self._clearing)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Remove output and change records in the block, which no cancellation interrupts."""
        async with self._removing:
            with trio.CancelScope(shield=True):  # the removals must be recorded
                try:
                    yield
                finally:
                    files, self._large = self._large, []
                    if files:  # in a thread that no job's end waits for
                        await in_thread(close_all, files)

    def _close_removed(self, files: Sequence[int]) -> None:
        """Close the files of removed output. The block of `_alone` closes the large ones."""
        large = [file for file in files if os.fstat(file).st_size >= LARGE_BYTES]
        self._large += large
        close_all([file for file in files if file not in large])

    def _log_missing(self) -> None:
        if self._kept.missing > self._missing_told:
            log.warning(
                "the output of %d ended jobs is missing in %s; that is not recorded as a removal, "
                "since the output may come back",
                self._kept.missing,
                self._spools,
            )
        self._missing_told = self._kept.missing

    async def remove(self, job: JobId, *, force: bool) -> int:
        """Remove an ended job, its output and its record. Returns how many bytes the output had.

        If the output is missing, the history records that, so that the job stays removed when the
        output is back (`takeover`). Raises Busy if the output is being followed; with `force` it is
        removed, and followers go on to its end. Raises InternalError, OutputError.
        """
        async with self._alone():
            freed = await self._in_thread(partial(self._kept.remove, job, force=force))
            missing = self._kept.misses(job)
            try:
                if missing:
                    await self._history.mark_output_missing(job)
                is_forgotten = await self._records.remove(job)
            except JobworkerError:  # the disk is still full: the job stays, without output
                if not missing:
                    await self._clear(await self._records.note([job], self._clock()) or ())
                raise
            if is_forgotten and job not in self._live:
                await self._clear([job])
            else:  # this removal, or another one, waits for the launcher
                self._live.add(job)
        return freed

    async def take_back(self, job: JobId) -> None:
        """Remove the output of a refused job. Its note stays until `clear`. Raises OutputError."""
        async with self._alone():
            self._live.add(job)  # first: if the disk refuses, the mark must stay
            await self._in_thread(partial(self._kept.remove, job, force=True))

    async def clear(self, job: JobId) -> None:
        """Remove the note of a job that neither the history nor the launcher has any more.

        While the launcher has the job, the note must stay: if the service were killed, only the
        note would tell the next one whose job it was, or that it was refused.
        """
        async with self._alone():
            await self._clear([job])
            self._live.discard(job)

    async def _clear(self, jobs: Collection[JobId]) -> None:
        """Forget these jobs, and remove their marks: the history has the removals."""
        await self._in_thread(partial(self._kept.forget, jobs))
        await in_thread(clear_marks, self._spools, jobs)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await in_thread(work, limiter=self._thread)


def _exists(path: Path) -> bool:
    """Whether there is anything at `path`. Raises OutputError if the disk cannot tell."""
    with disk_errors("look for"):
        try:
            os.lstat(path)
        except FileNotFoundError:
            return False
    return True
