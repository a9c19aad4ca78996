"""The catalogue: every method of the protocol, in one table.

A row says what a method is called, what it takes and answers, and which permission it needs.
The server's operations, the client and the documents all follow this table; a test holds that
each row has its operation and each operation its row.
"""

from attrs import frozen

from jobworker.model.access import Permission
from jobworker.model.job import JobRecord, JobStatus
from jobworker.protocol import messages as m

SUBPROTOCOL = "jobworker.v1"

OUTPUT = "job.output"
OUTPUT_END = "job.output_end"


@frozen
class Method:
    """One row."""

    name: str
    params: type
    result: type
    permission: Permission
    summary: str


_ROWS = (
    Method("service.hello", m.Nothing, m.Welcome, Permission.VIEW, "Tell who is who"),
    Method("job.run", m.RunParams, m.RunResult, Permission.RUN, "Run a command as a job"),
    Method("job.plan", m.PlanParams, m.Plan, Permission.RUN, "Tell how a command would be run"),
    Method("job.status", m.JobParams, JobStatus, Permission.VIEW, "Tell about one job"),
    Method("job.list", m.ListParams, m.ListResult, Permission.VIEW, "List jobs, newest first"),
    Method("job.wait", m.JobParams, JobRecord, Permission.VIEW, "Answer at the job's end"),
    Method("job.stop", m.StopParams, JobRecord, Permission.STOP, "Stop a job, answer at its end"),
    Method("job.log", m.LogParams, m.LogResult, Permission.LOG, "Subscribe to a job's output"),
    Method("job.credit", m.CreditParams, m.Nothing, Permission.VIEW, "Allow more output"),
    Method("job.unfollow", m.SubscriptionParams, m.Nothing, Permission.VIEW, "End a subscription"),
    Method("job.remove", m.RemoveParams, m.Removed, Permission.REMOVE, "Remove an ended job"),
    Method("job.prune", m.PruneParams, m.Removed, Permission.REMOVE, "Remove ended jobs' output"),
    Method("volume.create", m.VolumeSpec, m.Nothing, Permission.VOLUMES, "Make a volume"),
    Method("volume.list", m.Nothing, m.Volumes, Permission.VOLUMES, "List volumes, by name"),
    Method("volume.remove", m.VolumeParams, m.Nothing, Permission.VOLUMES, "Remove a volume"),
    Method("rpc.discover", m.Nothing, m.Discovery, Permission.VIEW, "Describe this protocol"),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


@frozen
class Notification:
    """What the server sends unasked, by the subscription that it belongs to."""

    name: str
    params: type
    summary: str


NOTIFICATIONS: dict[str, Notification] = {
    row.name: row
    for row in (
        Notification(OUTPUT, m.OutputHeader, "A piece of output, and its bytes or text"),
        Notification(OUTPUT_END, m.OutputEnd, "The end of a subscription"),
    )
}
