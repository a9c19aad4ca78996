"""The settlement of an ended job: the history has its end, and the launcher has forgotten it.

The disk or the launcher may refuse for now. Until both have done it, the job keeps its place: the
next service would adopt a job that the launcher has and the history does not have.
"""

import logging
from contextlib import suppress

import trio
from attrs import define, field

from jobworker.errors import JobworkerError, LauncherGone, LauncherSilent, NotFound
from jobworker.jobs.live_record import RECORD_AGAIN_SECONDS, LiveRecord
from jobworker.sandbox.service.launcher_client import LauncherClient

log = logging.getLogger("jobworker.jobs")


@define(eq=False, kw_only=True)
class Settlement:
    """Settles one job, again and again until it is done."""

    _live_record: LiveRecord
    _launcher: LauncherClient
    is_recorded: bool = field(default=False, init=False)
    """Whether the history has the end, as far as the job's execution knows."""
    _done: trio.Event = field(factory=trio.Event, init=False)
    """Set once the end is on the disk, or the job is removed, and the launcher has forgotten it."""
    _writing: trio.Lock = field(factory=trio.Lock, init=False)
    """Held while the end is written or removed: otherwise a removed record could come back."""

    @property
    def is_gone(self) -> bool:
        """Whether neither history nor launcher has the job any more."""
        return self._live_record.is_withdrawn and self._done.is_set()

    async def finish(self) -> None:
        """Wait until the end is recorded, or the job is removed, and the launcher forgot the job.

        Tries again as long as the disk or the launcher refuses.
        """
        while not self._done.is_set():
            with trio.move_on_after(RECORD_AGAIN_SECONDS):
                await self._done.wait()
            with suppress(JobworkerError):
                async with self._writing:
                    if not self._done.is_set():
                        await self._live_record.put(self._live_record.record)
                await self.forget()

    async def forget(self) -> None:
        """Have the launcher forget the job, if it still has it. The launcher may refuse for now."""
        if not self._done.is_set() and await self._remove():
            self._done.set()

    async def remove_record(self) -> bool:
        """Remove an ended job from the history. Returns whether the launcher has forgotten it too.

        If not, `finish` sees to that: the launcher may wait for a disk that hangs, and other
        removals must not wait for this one. Raises InternalError.
        """
        async with self._writing:
            await self._live_record.withdraw()
        return self.is_gone

    async def _remove(self) -> bool:
        """Have the launcher kill and forget the job. Returns False if it may still have the job."""
        record = self._live_record.record
        if record.started_at is not None:
            try:
                await self._launcher.remove(record.id)
            except JobworkerError as error:
                gone = isinstance(error, (LauncherGone, NotFound))
                is_over = gone or isinstance(error, LauncherSilent)  # this service ends
                level = logging.DEBUG if is_over else logging.ERROR
                log.log(level, "job %d: the launcher keeps it, for now: %s", record.id, error)
                return gone
        return True
