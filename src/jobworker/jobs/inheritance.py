"""What a service has of the jobs of an earlier one, and how it lets go of one in the launcher."""

from attrs import Factory, define

from jobworker.jobs.output.spool import Spool
from jobworker.model.job import JobId, JobRecord
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.service.launcher_client import LauncherClient


@define(eq=False)
class RunningJob:
    """A job that goes on."""

    record: JobRecord
    spool: Spool
    started: Started
    exits: Exits


@define(eq=False)
class WaitingJob:
    """A job that waits again."""

    record: JobRecord
    spool: Spool


@define(eq=False)
class EndedJob:
    """A job that has ended, and whose end the history may have refused."""

    record: JobRecord
    spool: Spool


@define(eq=False)
class Takeover:
    """What was taken over, in the order of ids."""

    running: list[RunningJob] = Factory(list)
    waiting: list[WaitingJob] = Factory(list)
    ended: list[EndedJob] = Factory(list)

    @property
    def ids(self) -> frozenset[JobId]:
        """The jobs that were taken over."""
        every: list[RunningJob | WaitingJob | EndedJob] = [
            *self.running,
            *self.waiting,
            *self.ended,
        ]
        return frozenset(each.record.id for each in every)


async def have_forgotten(launcher: LauncherClient, job: JobId) -> None:
    """Have the launcher forget a job that it has kept, and kill it if it lives."""
    let_go(*launcher.inherited[job])
    await launcher.begin_to_remove(job)  # a start waits for its place, where it needs that


def let_go(started: Started, exits: Exits) -> None:
    """Close what came of a job with the launcher's list."""
    close_all([started.stdout, started.stderr])
    exits.close()
