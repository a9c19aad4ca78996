"""A job's output on the disk when its end is told: fdatasync(2), bounded in time and threads.

Each file has a thread, since file systems with a journal commit what comes together. The files of
one owner's jobs that end at once wait for each other, a few jobs at a time, and for nobody else's:
large output, or a disk that hangs below it, delays no other owner's ends. Such a disk keeps the
threads, and the owner's places, and the files stay open until the call returns; the end of the job
waits no longer than SYNC_SECONDS.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from weakref import WeakValueDictionary

import trio
from attrs import define, field

from jobworker.model.job import JobId
from jobworker.threads import in_thread

log = logging.getLogger("jobworker.jobs")

SYNC_SECONDS = 5.0
"""How long an end may wait for the disk to take the job's output."""
SYNC_JOBS = 4
"""Of one owner, at a time: each has three threads at the most."""
_shares = trio.lowlevel.RunVar[WeakValueDictionary[str, trio.CapacityLimiter]]("output_sync")
"""By owner, as long as one of their jobs has a place or waits for one."""


@define(eq=False, kw_only=True)
class OutputSync:
    """One job's files; `fault` says, in words, why the disk may not have all of them."""

    _job: JobId
    _owner: str
    _files: Sequence[int]
    _hold: Callable[[], None]
    """Keeps the files open until `release` is called as often; in Trio's thread, both."""
    _release: Callable[[], None]
    fault: str = field(default="", init=False)
    _share: trio.CapacityLimiter = field(init=False)
    _under_way: int = field(default=0, init=False)

    async def run(self) -> None:
        """Have the disk take the files, or give up waiting for it."""
        self._share = _share_of(self._owner)
        with trio.move_on_after(SYNC_SECONDS) as scope:
            await self._share.acquire_on_behalf_of(self)
            self._under_way = len(self._files)
            async with trio.open_nursery() as nursery:
                for file in self._files:
                    nursery.start_soon(self._sync, file)
        if scope.cancelled_caught:
            log.warning(
                "job %d: the disk has not taken its output after %g s; its end is told",
                self._job,
                SYNC_SECONDS,
            )

    async def _sync(self, file: int) -> None:
        token = trio.lowlevel.current_trio_token()
        share = [file]  # taken by the thread, or by this task where none begins
        self._hold()

        def sync() -> None:
            if _taken(share):
                try:
                    os.fdatasync(file)
                finally:
                    with suppress(trio.RunFinishedError):
                        token.run_sync_soon(self._done)

        try:
            # The place among the owner's jobs is bound enough: the thread begins at once.
            await in_thread(sync, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True)
        except OSError as error:
            self.fault = f"its output may not be on the disk: {error.strerror}"
        finally:
            if _taken(share):
                self._done()

    def _done(self) -> None:
        self._release()
        self._under_way -= 1
        if not self._under_way:
            self._share.release_on_behalf_of(self)


def _share_of(owner: str) -> trio.CapacityLimiter:
    try:
        shares = _shares.get()
    except LookupError:
        _shares.set(shares := WeakValueDictionary())
    return shares.setdefault(owner, trio.CapacityLimiter(SYNC_JOBS))


def _taken(share: list[int]) -> bool:
    """Take what one of two threads may take: whether this one has."""
    try:
        share.pop()
    except IndexError:
        return False
    return True
