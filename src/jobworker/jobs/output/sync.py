"""A job's output on the disk when its end is told: fdatasync(2), bounded in time and threads.

Each file has a thread, since file systems with a journal commit what comes together. The files of
one owner's jobs that end at once wait for each other, a few jobs at a time, and for nobody else's:
large output, or a disk that hangs below it, delays no other owner's ends. Such a disk keeps the
threads, and the owner's places, and the files stay open until the call returns; the end of the job
waits no longer than SYNC_SECONDS.

Output that had no place by then stands in a line of its owner's, and the disk is asked to take it
later, one job at a time, in the order of the ends (`_Share`). The line keeps no file open, so the
files are opened anew. Where it is full, the record says that the output may not be on the disk.
What the disk refuses after an end was told goes to the log.
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
"""How long an end may wait for the disk to take the job's output."""
SYNC_JOBS = 4
"""Of one owner, at a time: each has three threads at the most."""
LATER_JOBS = 1000
"""Of one owner, whose ends were told before their output had a place."""
AGAIN_SECONDS = 1.0
NOT_SYNCED = "its output may not be on the disk"


@define(eq=False)
class _Share:
    """What one owner's jobs share: the places of those whose ends wait, and the line of others."""

    places: trio.CapacityLimiter = field(factory=lambda: trio.CapacityLimiter(SYNC_JOBS))
    _later: deque[tuple[JobId, Path]] = field(factory=deque)
    _serving: bool = False

    def queue(self, job: JobId, directory: Path) -> bool:
        """Have the disk take a job's output after that of others: False where too many wait."""
        if len(self._later) >= LATER_JOBS:
            return False
        self._later.append((job, directory))
        if not self._serving:
            self._serving = True
            trio.lowlevel.spawn_system_task(self._serve)
        return True

    async def _serve(self) -> None:
        """Ask the disk to take what waits, until nothing does. Raises nothing of its own."""
        try:
            while self._later:
                await self._sync(*self._later[0])
                self._later.popleft()
        finally:
            self._serving = False
            if self._later:
                jobs = ", ".join(str(job) for job, _ in self._later)
                log.warning("the service ends before the disk took the output of jobs %s", jobs)

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
                pass  # removed meanwhile
            except Exception as error:  # noqa: BLE001 - told; it would end the whole event loop
                _tell_late(job, error)
            return


_shares = trio.lowlevel.RunVar[WeakValueDictionary[str, _Share]]("output_sync")
"""By owner, as long as something of one of their jobs is under way or waits."""


@define(eq=False, kw_only=True)
class OutputSync:
    """One job's files, in `directory`; `end` says why the disk may not have all of them."""

    _job: JobId
    _owner: str
    _files: Sequence[int]
    _directory: Path
    _hold: Callable[[], None]
    """Keeps the files open until `release` is called as often; in Trio's thread, both."""
    _release: Callable[[], None]
    _fault: str = field(default="", init=False)
    _ended: bool = field(default=False, init=False)
    _left_out: bool = field(default=True, init=False)
    """Whether there is a file that no thread has begun with."""
    _share: _Share = field(init=False)
    _under_way: int = field(default=0, init=False)

    async def run(self) -> None:
        """Have the disk take the files, or give up waiting for it."""
        self._share = _share_of(self._owner)
        try:
            with trio.move_on_after(SYNC_SECONDS) as scope:
                await self._share.places.acquire_on_behalf_of(self)
                self._left_out = False
                self._under_way = len(self._files)
                async with trio.open_nursery() as nursery:
                    for file in self._files:
                        nursery.start_soon(self._sync, file)
        finally:
            if self._left_out and not self._share.queue(self._job, self._directory):
                self._fault = f"{NOT_SYNCED}: that of {LATER_JOBS} jobs before it is not, either"
        if scope.cancelled_caught:
            log.warning(
                "job %d: the disk has not taken its output after %g s; its end is told",
                self._job,
                SYNC_SECONDS,
            )

    def end(self) -> str:
        """Why the disk may not have the output, in words; what comes later goes to the log."""
        self._ended = True
        return self._fault

    async def _sync(self, file: int) -> None:
        token = trio.lowlevel.current_trio_token()
        share = [file]  # taken by the thread, or by this task where none begins
        self._hold()

        def sync() -> None:
            if _taken(share):
                error = None
                try:
                    error = _refusal(file)
                finally:
                    with suppress(trio.RunFinishedError):
                        token.run_sync_soon(self._done, error)

        try:
            # The place among the owner's jobs is bound enough: the thread begins at once.
            await in_thread(sync, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True)
        finally:
            if _taken(share):
                self._left_out = True
                self._done(None)

    def _done(self, error: OSError | None) -> None:
        if error is not None and self._ended:
            _tell_late(self._job, error)
        elif error is not None:
            self._fault = f"{NOT_SYNCED}: {error.strerror}"
        self._release()
        self._under_way -= 1
        if not self._under_way:
            self._share.places.release_on_behalf_of(self)


def _share_of(owner: str) -> _Share:
    try:
        shares = _shares.get()
    except LookupError:
        _shares.set(shares := WeakValueDictionary())
    return shares.setdefault(owner, _Share())


def _sync_files(directory: Path) -> None:
    """Have the disk take the files in `directory`. Raises what `open_files` does, and OSError."""
    files = open_files(directory, writable=False, partial=True)
    try:
        refusals = [error for file in files if (error := _refusal(file)) is not None]
    finally:
        for file in files:
            os.close(file)
    if refusals:
        raise refusals[0]


def _refusal(file: int) -> OSError | None:
    """Have the disk take a file: its error, if it does not."""
    try:
        os.fdatasync(file)
    except OSError as error:
        return error
    return None


def _tell_late(job: JobId, error: Exception) -> None:
    """Say in the log what an end that was told does not."""
    why = error.strerror if isinstance(error, OSError) else error
    log.error("job %d, whose end was told: %s: %s", job, NOT_SYNCED, why)


def _taken(share: list[int]) -> bool:
    """Take what one of two threads may take: whether this one has."""
    try:
        share.pop()
    except IndexError:
        return False
    return True
