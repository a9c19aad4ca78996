"""The record of one live job: what clients may see of it, and how the history gets it.

A write waits until the first record of the job is on the disk, and is left out once the job was
refused or removed: otherwise the record would come back.
"""

import logging
from datetime import datetime, timedelta

import trio
from attrs import define, evolve, field

from jobworker.errors import InternalError, JobworkerError
from jobworker.jobs.history.history import History
from jobworker.jobs.output.sizes import as_of_now
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.rules import Clock
from jobworker.model.job import SERVICE_ENDED, JobRecord, JobSpec, OutputCut
from jobworker.model.lifecycle import TERMINAL, Event, advance
from jobworker.model.summary import without_bulk

log = logging.getLogger("jobworker.jobs")

RECORD_AGAIN_SECONDS = 1.0
"""The pause before another attempt to write a record that the disk has refused."""


def _set_event() -> trio.Event:
    event = trio.Event()
    event.set()
    return event


@define(eq=False, kw_only=True)
class LiveRecord:
    """The record of a live job, with its writes to the history."""

    record: JobRecord
    """The record that clients may see. It has the end only once that is on the disk, or the disk
    has refused it."""
    spool: Spool
    _history: History
    _clock: Clock
    admission: trio.Event = field(factory=_set_event, init=False)
    """Set once the job's first record is on the disk, or the job was refused."""
    changed: trio.Event = field(factory=trio.Event, init=False)
    """Set when the record of a running job has changed and is to be written."""
    is_withdrawn: bool = field(default=False, init=False)
    """Whether the history must not have the record, since the job was refused or removed."""
    ends_with_service: bool = field(default=False, init=False)
    """Whether the end of this service is the first reason for the job's end."""
    runs_since: float | None = field(default=None, init=False)
    """When the program began, by Trio's clock, which is never set back."""
    exited_at: float | None = field(default=None, init=False)
    """When the program ended, by the same clock."""

    def now(self) -> JobRecord:
        """The record, with the present sizes of the output if the job has not ended."""
        return as_of_now(self.record, self.spool.statistics())

    def note(self, detail: str) -> None:
        """Add a sentence to the detail of a running job's record."""
        self.record = self.record.noted(detail)
        self.changed.set()

    def note_cut(self, cut: OutputCut, why: str) -> None:
        """Note that the log is cut."""
        self.record = evolve(self.record, output_cut=cut)
        self.note(why)

    def note_removal_of_output(self, when: datetime) -> None:
        """Note in memory that the output of an ended job was removed at this time.

        If an earlier removal is noted, its time stays: clients may have been told of it.
        """
        if self.record.output_removed_at is None:
            self.record = evolve(self.record, output_removed_at=when)

    def note_stop(self, seconds_ago: float = 0.0) -> None:
        """Note when a client first asked for the job's end, if none is noted yet."""
        if self.record.stop_requested_at is None:
            when = self._clock() - timedelta(seconds=seconds_ago)
            self.record = evolve(self.record, stop_requested_at=when)

    def stop_was_told(self) -> None:
        """Write a stop to the record, now that the launcher has it for the next service."""
        if self.record.stop_requested_at is not None:
            self.changed.set()

    def note_start(self, age_seconds: float) -> None:
        """Note that the program has begun so many seconds ago."""
        self.runs_since = trio.current_time() - age_seconds

    def note_exit(self, seconds_ago: float) -> None:
        """Note that the program has ended so many seconds ago."""
        self.exited_at = trio.current_time() - seconds_ago

    def shorten(self) -> None:
        """Free the memory of a large request. The history has all of it."""
        self.record = without_bulk(self.record)

    async def whole_spec(self) -> JobSpec:
        """The whole request, from the record or from the history. Raises JobworkerError."""
        if not self.record.abridged:
            return self.record.spec
        stored = await self._history.request(self.record.id)
        if stored is None:
            raise InternalError(
                f"cannot start job {self.record.id}: the history has lost its request",
                remedy="run the command again",
            )
        return stored

    def started(self) -> JobRecord:
        """The record of a job that starts now."""
        return self.advanced(Event.START, started_at=self._clock())

    def advanced(self, event: Event, *words: str, **changes: object) -> JobRecord:
        """The record after `event`, with `words` added to its detail and other `changes`."""
        record = self.record
        for each in words:
            record = record.noted(each)
        if event is Event.STOP and self.ends_with_service:
            record = record.noted(SERVICE_ENDED)
        state = advance(record.state, event)
        if state in TERMINAL:
            changes["ended_at"] = self._ended_at()
        return evolve(record, state=state, **changes)  # type: ignore[arg-type]

    def _ended_at(self) -> datetime:
        """The time at which the job ended: its start plus the time that it has run, or later.

        The end may be a while ago, since output was drained after it, or no service was running.
        The time of day may have been set back since the start.
        """
        now = trio.current_time()
        exited_at = now if self.exited_at is None else self.exited_at
        ended_at = self._clock() - timedelta(seconds=now - exited_at)
        if self.record.started_at is None or self.runs_since is None:
            return ended_at
        ran_seconds = max(0.0, exited_at - self.runs_since)
        return max(ended_at, self.record.started_at + timedelta(seconds=ran_seconds))

    async def store(self, record: JobRecord | None = None) -> bool:
        """Write the present record, or `record`, to the history. Returns whether it is there.

        A refusal is logged: the job goes on.
        """
        try:
            await self.put(record or self.now())
        except JobworkerError as error:
            log.error("%s", error)
            return False
        return True

    async def put(self, record: JobRecord) -> None:
        """Write a record to the history, unless the job was refused or removed.

        Waits until the first record of the job is there. An earlier write would use the space that
        is reserved for ends, and would stay if the job is refused. Raises InternalError.
        """
        if not self.admission.is_set():
            await self.admission.wait()
        if not self.is_withdrawn:
            await self._history.put(record)

    async def serve(self) -> None:
        """Write the record whenever it has changed: a stop was requested, or the log was cut.

        So the next service goes on with it if this one is killed. If the disk refuses, which may be
        why the log was cut, this tries again. Never returns. If it is cancelled beside a change,
        `changed` is set.
        """
        while True:
            await self.changed.wait()
            self.changed = trio.Event()
            try:
                await self.put(self.now())
            except JobworkerError as error:
                log.debug("%s", error)
                self.changed.set()
                await trio.sleep(RECORD_AGAIN_SECONDS)
            except BaseException:
                self.changed.set()
                raise

    async def keep_note(self) -> None:
        """Write the present record to the job's note: the history may take long to record it.

        If this service were killed before that, the next one would not know of a cut log, and would
        add to it after a gap.
        """
        await self._history.keep_note(self.now())

    async def withdraw(self) -> None:
        """Remove the record from the history, for good. Raises InternalError."""
        if not self.is_withdrawn:
            await self._history.remove(self.record.id)
            self.is_withdrawn = True
