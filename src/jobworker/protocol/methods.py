"""The table of methods: every method of the protocol, in one table.

A row has a method's name, the types of its parameters and its result, and its permissions: one for
every call, and others for calls with certain parameters (`ConditionalPermission`). The
authorization checks the permissions of the row (`Method.needs`), so no operation checks a
permission itself.

The server's operations, the client and the documents all follow this table. A test checks that each
row has its operation and each operation its row.
"""

from collections.abc import Callable, Iterator

from attrs import frozen

from jobworker.model.access import Permission
from jobworker.model.job import JobRecord, JobSpec, JobStatus
from jobworker.model.units import format_duration
from jobworker.protocol import messages as m

SUBPROTOCOL = "jobworker.v1"

OUTPUT = "job.output"
OUTPUT_END = "job.output_end"


@frozen
class ConditionalPermission:
    """A permission that a call needs besides its method's own if it has certain parameters."""

    permission: Permission
    when: str
    """For the documents: which calls need it."""
    asked_for: Callable[[object, float], str]
    """Return why a call needs it, in words that follow the method's name; "" if it does not.

    The arguments are the call's parameters, and the longest time limit in seconds that a role
    without the permission `unbounded` may request.
    """


def _follow(params: object, _: float) -> str:
    assert isinstance(params, m.RunParams)
    return "" if params.follow is None else "with follow"


def _long_time(params: object, longest_seconds: float) -> str:
    seconds = _job_of(params).timeout_seconds
    if seconds == 0:
        return "without a time limit"
    if seconds is not None and seconds > longest_seconds:
        return f"with a time limit of more than {format_duration(longest_seconds)}"
    return ""


def _volumes(params: object, _: float) -> str:
    return "with volumes" if _job_of(params).volumes else ""


def _force(params: object, _: float) -> str:
    assert isinstance(params, m.RemoveParams)
    return "with force" if params.force else ""


def _job_of(params: object) -> JobSpec:
    assert isinstance(params, m.RunParams | m.PlanParams)
    return params.job


_FOLLOW = ConditionalPermission(Permission.LOG, "with `follow`", _follow)
_LONG_TIME = ConditionalPermission(
    Permission.UNBOUNDED,
    "without a time limit, or with one of more than `worker.max_job_timeout`",
    _long_time,
)
_VOLUMES = ConditionalPermission(Permission.VOLUMES, "with `volumes`", _volumes)
_FORCE = ConditionalPermission(Permission.STOP, "with `force`", _force)


@frozen
class Method:
    """A method: one row of the table."""

    name: str
    params: type
    result: type
    permission: Permission
    """The permission that every call needs."""
    summary: str
    conditions: tuple[ConditionalPermission, ...] = ()
    """The permissions that some calls need besides."""

    def needs(self, params: object, longest_seconds: float) -> Iterator[tuple[Permission, str]]:
        """Yield each permission that a call with these parameters needs, and the reason in words.

        The method's own permission is first; only the later ones depend on the parameters.
        """
        yield self.permission, self.name
        for condition in self.conditions:
            if asked := condition.asked_for(params, longest_seconds):
                yield condition.permission, f"{self.name} {asked}"


_ROWS = (
    Method("service.hello", m.Nothing, m.Welcome, Permission.VIEW, "Return the caller's identity"),
    Method(
        "job.run",
        m.RunParams,
        m.RunResult,
        Permission.RUN,
        "Run a command as a job",
        conditions=(_FOLLOW, _LONG_TIME, _VOLUMES),
    ),
    Method(
        "job.plan",
        m.PlanParams,
        m.Plan,
        Permission.RUN,
        "Return how a command would be run",
        conditions=(_LONG_TIME, _VOLUMES),
    ),
    Method("job.status", m.JobParams, JobStatus, Permission.VIEW, "Return one job's record"),
    Method("job.list", m.ListParams, m.ListResult, Permission.VIEW, "List jobs, newest first"),
    Method("job.wait", m.JobParams, JobRecord, Permission.VIEW, "Answer at the job's end"),
    Method("job.stop", m.StopParams, JobRecord, Permission.STOP, "Stop a job, answer at its end"),
    Method("job.log", m.LogParams, m.LogResult, Permission.LOG, "Subscribe to a job's output"),
    Method("job.credit", m.CreditParams, m.Nothing, Permission.VIEW, "Allow more output"),
    Method("job.unfollow", m.SubscriptionParams, m.Nothing, Permission.VIEW, "End a subscription"),
    Method(
        "job.remove",
        m.RemoveParams,
        m.Removed,
        Permission.REMOVE,
        "Remove an ended job",
        conditions=(_FORCE,),
    ),
    Method("job.prune", m.PruneParams, m.Removed, Permission.REMOVE, "Remove ended jobs' output"),
    Method("volume.create", m.VolumeSpec, m.Nothing, Permission.VOLUMES, "Make a volume"),
    Method("volume.list", m.Nothing, m.Volumes, Permission.VOLUMES, "List volumes, by name"),
    Method("volume.remove", m.VolumeParams, m.Nothing, Permission.VOLUMES, "Remove a volume"),
    Method("rpc.discover", m.Nothing, m.Discovery, Permission.VIEW, "Describe this protocol"),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


@frozen
class Notification:
    """A message that the server sends for a subscription, without a request."""

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
