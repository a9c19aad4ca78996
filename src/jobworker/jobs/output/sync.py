"""Sync a job's output to the disk before its end is announced: fdatasync(2), bounded in time.

Each file of a job has a thread of its own: a file system with a journal commits concurrent syncs
together. At most SYNC_JOBS jobs of one owner sync at a time. Jobs of different owners do not wait
for each other. So large output, or a disk that hangs under it, delays no other owner's ends. A disk
that hangs keeps the threads, the owner's places and the open files until fdatasync(2) returns. The
end of the job waits SYNC_SECONDS at most.

If a job got no place in this time, its output waits in a queue of its owner and is synced later,
one job at a time, in the order of the ends (`_OwnerSyncs`). The queue keeps no file open, so the
files are opened again then. If the queue is full, the record says that the output may not be on the
disk. If a sync fails after the end was announced, the log says so.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

import trio
from attrs import define, field

from jobworker.errors import NotFound, OutOfDescriptors
from jobworker.jobs.output.directory import open_files
from jobworker.model.job import JobId
from jobworker.threads import in_thread

log = logging.getLogger("jobworker.jobs")

SYNC_SECONDS = 5.0
"""How long the end of a job waits for its output to be synced."""
SYNC_JOBS = 4
"""The most jobs of one owner that are synced before their ends at a time. A job has up to three
threads."""
LATER_JOBS = 1000
"""The most jobs in the queue of one owner, to be synced after their ends."""
AGAIN_SECONDS = 1.0
"""The pause before another attempt if the process had no file descriptor left."""
NOT_SYNCED = "its output may not be on the disk"


@define(eq=False)
class _OwnerSyncs:
    """The syncs of one owner's jobs: places for jobs whose ends wait, and the queue of others."""

    places: trio.CapacityLimiter = field(factory=lambda: trio.CapacityLimiter(SYNC_JOBS))
    _later: deque[tuple[JobId, Path]] = field(factory=deque)
    _serving: bool = False

    def queue(self, job: JobId, directory: Path) -> bool:
        """Sync a job's output later, after the jobs in the queue. False if the queue is full."""
        if len(self._later) >= LATER_JOBS:
            return False
        self._later.append((job, directory))
        if not self._serving:
            self._serving = True
            trio.lowlevel.spawn_system_task(self._serve)
        return True

    async def _serve(self) -> None:
        """Sync the jobs of the queue until it is empty. Raises only trio.Cancelled."""
        try:
            while self._later:
                await self._sync(*self._later[0])
                self._later.popleft()
        finally:
            self._serving = False
            if self._later:
                jobs = ", ".join(str(job) for job, _ in self._later)
                log.warning("the service ends before the output of jobs %s was synced", jobs)

    async def _sync(self, job: JobId, directory: Path) -> None:
        while True:
            try:
                await in_thread(
                    _sync_files, directory, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True
                )
            except OutOfDescriptors:
                await trio.sleep(AGAIN_SECONDS)
                continue
            except NotFound:
                pass  # the output was removed meanwhile
            except Exception as error:  # noqa: BLE001 - logged; it would end the whole event loop
                _log_late(job, error)
            return


_of_owners = trio.lowlevel.RunVar[WeakValueDictionary[str, _OwnerSyncs]]("output_sync")
"""By the owner's name, as long as output of one of the owner's jobs is being synced or waits."""


@define(eq=False, kw_only=True)
class OutputSync:
    """The sync of one job's files, which stand in `directory`."""

    _job: JobId
    _owner: str
    _files: Sequence[int]
    _directory: Path
    _hold: Callable[[], None]
    """Keeps the files open until `release` was called as often. Both run in Trio's thread."""
    _release: Callable[[], None]
    _fault: str = field(default="", init=False)
    _ended: bool = field(default=False, init=False)
    _left_out: bool = field(default=True, init=False)
    """Whether there is a file that no thread has begun to sync."""
    _owner_syncs: _OwnerSyncs = field(init=False)
    _under_way: int = field(default=0, init=False)
    """The number of files whose sync has not ended."""

    async def run(self) -> None:
        """Sync the files. Returns when that is done, or after `SYNC_SECONDS`."""
        self._owner_syncs = _syncs_of(self._owner)
        try:
            with trio.move_on_after(SYNC_SECONDS) as scope:
                await self._owner_syncs.places.acquire_on_behalf_of(self)
                self._left_out = False
                self._under_way = len(self._files)
                async with trio.open_nursery() as nursery:
                    for file in self._files:
                        nursery.start_soon(self._sync, file)
        finally:
            if self._left_out and not self._owner_syncs.queue(self._job, self._directory):
                self._fault = f"{NOT_SYNCED}: that of {LATER_JOBS} jobs before it is not, either"
        if scope.cancelled_caught:
            log.warning(
                "job %d: its output is not synced after %g s; its end does not wait any longer",
                self._job,
                SYNC_SECONDS,
            )

    def end(self) -> str:
        """The reason why the output may not be on the disk, or "". Later faults go to the log."""
        self._ended = True
        return self._fault

    async def _sync(self, file: int) -> None:
        token = trio.lowlevel.current_trio_token()
        claim = [file]  # the thread takes it when it begins, or this task if no thread begins
        self._hold()

        def sync() -> None:
            if _take(claim):
                error = None
                try:
                    error = _sync_file(file)
                finally:
                    with suppress(trio.RunFinishedError):
                        token.run_sync_soon(self._done, error)

        try:
            # A limiter of its own, so the thread begins at once: `places` bounds the threads.
            await in_thread(sync, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True)
        finally:
            if _take(claim):
                self._left_out = True
                self._done(None)

    def _done(self, error: OSError | None) -> None:
        if error is not None and self._ended:
            _log_late(self._job, error)
        elif error is not None:
            self._fault = f"{NOT_SYNCED}: {error.strerror}"
        self._release()
        self._under_way -= 1
        if not self._under_way:
            self._owner_syncs.places.release_on_behalf_of(self)


def _syncs_of(owner: str) -> _OwnerSyncs:
    try:
        of_owners = _of_owners.get()
    except LookupError:
        _of_owners.set(of_owners := WeakValueDictionary())
    return of_owners.setdefault(owner, _OwnerSyncs())


def _sync_files(directory: Path) -> None:
    """Sync the files in `directory`. Raises the errors of `open_files`, and OSError."""
    files = open_files(directory, writable=False, partial=True)
    try:
        errors = [error for file in files if (error := _sync_file(file)) is not None]
    finally:
        for file in files:
            os.close(file)
    if errors:
        raise errors[0]


def _sync_file(file: int) -> OSError | None:
    """Sync an open file. Returns the error if that fails."""
    try:
        os.fdatasync(file)
    except OSError as error:
        return error
    return None


def _log_late(job: JobId, error: Exception) -> None:
    """Log a fault that comes too late for the end of the job to include it."""
    why = error.strerror if isinstance(error, OSError) else error
    log.error("job %d, whose end was announced before: %s: %s", job, NOT_SYNCED, why)


def _take(claim: list[int]) -> bool:
    """Take the claim, which two threads may try to take. Returns whether this one has it."""
    try:
        claim.pop()
    except IndexError:
        return False
    return True
