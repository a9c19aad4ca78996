"""The jobs that a service takes over from an earlier one, as data; and giving up one of them.

`jobs.takeover` makes this data.
"""

from attrs import Factory, define

from jobworker.jobs.output.spool import Spool
from jobworker.model.job import JobId, JobRecord
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.service.launcher_client import LauncherClient


@define(eq=False)
class RunningJob:
    """A job whose program the launcher still runs, or whose exit the launcher has kept."""

    record: JobRecord
    spool: Spool
    started: Started
    exits: Exits


@define(eq=False)
class WaitingJob:
    """A job that waits again for its start."""

    record: JobRecord
    spool: Spool


@define(eq=False)
class EndedJob:
    """A job that has ended. The history may have refused the record of its end."""

    record: JobRecord
    spool: Spool


@define(eq=False)
class Takeover:
    """The jobs that were taken over, in the order of their ids."""

    running: list[RunningJob] = Factory(list)
    waiting: list[WaitingJob] = Factory(list)
    ended: list[EndedJob] = Factory(list)

    @property
    def ids(self) -> frozenset[JobId]:
        """The ids of all of these jobs."""
        every: list[RunningJob | WaitingJob | EndedJob] = [
            *self.running,
            *self.waiting,
            *self.ended,
        ]
        return frozenset(each.record.id for each in every)


async def have_forgotten(launcher: LauncherClient, job: JobId) -> None:
    """Have the launcher kill and forget a job that it has kept. Raises JobworkerError."""
    let_go(*launcher.inherited[job])
    await launcher.begin_to_remove(job)  # a later start waits for the place, if it needs it


def let_go(started: Started, exits: Exits) -> None:
    """Close the pipes and the channel that the launcher's list has given for a job."""
    close_all([started.stdout, started.stderr])
    exits.close()
