"""The records of removals: when output was removed, in memory for live jobs or in the history.

A job is unsettled from its end until the history has its record and the launcher has forgotten it.
Until then its execution has the record, and the mark of a removal stays with the job's note: if the
service were killed, and the history or the launcher knew of the job alone, the note would tell the
next service whose job it was.
"""

import logging
from collections.abc import Collection, Sequence
from datetime import datetime

from attrs import define, field

from jobworker.errors import JobworkerError
from jobworker.jobs.execution import Execution
from jobworker.jobs.history.history import History
from jobworker.model.access import no_such_job
from jobworker.model.job import JobId, JobRecord

log = logging.getLogger("jobworker.jobs")


@define(eq=False)
class RemovalRecords:
    """Records removals, of output and of whole jobs."""

    _history: History
    _unsettled: dict[JobId, Execution] = field(factory=dict, init=False)
    """Ended jobs of which the execution has the record."""

    def take(self, execution: Execution) -> None:
        """From now on the execution of this ended job has its record."""
        self._unsettled[execution.record.id] = execution

    def forget(self, job: JobId) -> None:
        """From now on the history alone has the record of this job."""
        self._unsettled.pop(job, None)

    async def latest(self, job: JobId) -> JobRecord:
        """The latest record of an ended job. Raises NotFound, InternalError."""
        unsettled = self._unsettled.get(job)
        record = unsettled.record if unsettled else await self._history.summary(job)
        if record is None:
            raise no_such_job(job)
        return record

    async def note(self, jobs: Sequence[JobId], when: datetime) -> Collection[JobId] | None:
        """Record that the output of jobs was removed. Returns those whose marks may go.

        None if the disk refuses: then all marks stay, and a later look finds them.
        """
        unsettled = [self._unsettled[job] for job in jobs if job in self._unsettled]
        for execution in unsettled:
            execution.live_record.note_removal_of_output(when)
        settled = [job for job in jobs if job not in self._unsettled]
        try:
            if settled:
                await self._history.mark_output_removed(settled, when)
            for execution in unsettled:
                await execution.live_record.put(execution.record)
        except JobworkerError as error:
            log.error("the output of %d jobs was removed: %s", len(jobs), error)
            return None
        return settled

    async def remove(self, job: JobId) -> bool:
        """Remove a job from the history. Returns False if the launcher may still have it.

        Raises InternalError.
        """
        execution = self._unsettled.get(job)
        if execution is None:
            await self._history.remove(job)
            return True
        is_forgotten = await execution.settlement.remove_record()
        self.forget(job)
        return is_forgotten
