"""A job's output on the disk when its end is told: fdatasync(2), bounded in time and threads.

Each file has a thread, since file systems with a journal commit what comes together. A disk that
hangs keeps its threads, which are apart from those of other work, and its files stay open until the
call returns; the end of the job waits no longer than SYNC_SECONDS.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

import trio
from attrs import define, field

from jobworker.threads import in_thread

log = logging.getLogger("jobworker.jobs")

SYNC_SECONDS = 5.0
"""How long an end may wait for the disk to take the job's output."""
SYNC_THREADS = 16
"""Of all jobs together."""
_limiters = trio.lowlevel.RunVar[trio.CapacityLimiter]("output_sync")


@define(eq=False)
class OutputSync:
    """One job's files; `fault` says, in words, why the disk may not have all of them."""

    _files: Sequence[int]
    _hold: Callable[[], None]
    """Keeps the files open until `release` is called as often; in Trio's thread, both."""
    _release: Callable[[], None]
    fault: str = field(default="", init=False)

    async def run(self) -> None:
        """Have the disk take the files, or give up waiting for it."""
        with trio.move_on_after(SYNC_SECONDS) as scope:
            async with trio.open_nursery() as nursery:
                for file in self._files:
                    nursery.start_soon(self._sync, file)
        if scope.cancelled_caught:
            log.warning(
                "the disk has not taken a job's output after %g s; its end is told", SYNC_SECONDS
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
                        token.run_sync_soon(self._release)

        try:
            await in_thread(sync, limiter=_limiter(), abandon_on_cancel=True)
        except OSError as error:
            self.fault = f"its output may not be on the disk: {error.strerror}"
        finally:
            if _taken(share):
                self._release()


def _limiter() -> trio.CapacityLimiter:
    try:
        return _limiters.get()
    except LookupError:
        _limiters.set(limiter := trio.CapacityLimiter(SYNC_THREADS))
        return limiter


def _taken(share: list[int]) -> bool:
    """Take what one of two threads may take: whether this one has."""
    try:
        share.pop()
    except IndexError:
        return False
    return True
