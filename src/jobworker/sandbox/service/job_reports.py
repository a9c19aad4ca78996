"""The launcher's reports of jobs as the service's data: an end, a job to take over, its usage.

The launcher reports a time as the seconds since then. These functions convert it at once to a time
of the host's monotonic clock (time.monotonic), which stays right until a caller reads it.
"""

import time

from attrs import Factory, frozen

from jobworker.model.job import Usage
from jobworker.sandbox.cgroup import accounting
from jobworker.sandbox.cgroup.accounting import Want
from jobworker.sandbox.protocol.end_requests import EndRequestReport
from jobworker.sandbox.protocol.events import JobEnded
from jobworker.sandbox.protocol.replies import JobEntry


@frozen(kw_only=True)
class JobExit:
    """How a job's first process ended: its exit code, or the signal that killed it."""

    code: int | None
    signal: int | None
    usage: Usage | None
    """The job's usage; None if the launcher could not read it."""
    lost: tuple[str, ...] = ()
    """Where writes of the job were lost: names of volumes, and "" for its own disk."""
    unseen: tuple[str, ...] = ()
    """Names of volumes for which the launcher could not find out whether writes were lost."""
    want: Want = ""
    """Which memory was short when the kernel killed processes of the job; "" if it killed none."""
    ended_at: float = Factory(time.monotonic)

    @property
    def seconds_ago(self) -> float:
        """How long ago the job ended."""
        return time.monotonic() - self.ended_at


@frozen(kw_only=True)
class EarlierEndRequest:
    """The end of a job that an earlier service has asked for: see
    `sandbox.protocol.end_requests`."""

    cause: str
    first_at: float
    """When the service asked first."""
    kill_at: float
    """When the job is to be killed."""
    signals: frozenset[int]
    """The signals that the service has sent for it."""

    @property
    def seconds_ago(self) -> float:
        """How long ago the service asked first."""
        return time.monotonic() - self.first_at

    @property
    def kill_in_seconds(self) -> float:
        """The time until the job is to be killed; negative if that time has passed."""
        return self.kill_at - time.monotonic()


@frozen(kw_only=True)
class KeptJob:
    """A job that the launcher has kept, and the read ends of its pipes."""

    job: int
    pid: int
    since: float
    """When its program was started."""
    exit: JobExit | None
    """How it ended; None while it is alive."""
    stdout: int
    stderr: int
    network_end: str = ""
    """Why it lost its private network; "" if it did not."""
    asked: EarlierEndRequest | None = None
    """None if no service asked for its end, or an earlier launcher did not keep that."""


def exit_from(event: JobEnded) -> JobExit:
    """The end of a job, of the launcher's event."""
    used = usage_from(event.usage)
    return JobExit(
        code=event.how.code,
        signal=event.how.signal,
        usage=used if event.measured else None,
        lost=event.how.lost,
        unseen=event.how.unseen,
        want=_want_from(event.how.want, used),
        ended_at=time.monotonic() - event.seconds_ago,
    )


def kept_job_from(entry: JobEntry, stdout: int, stderr: int) -> KeptJob:
    """The job of an entry in the launcher's list, with the read ends of its pipes."""
    end = None
    if entry.exit is not None:
        end = exit_from(
            JobEnded(entry.job, entry.ended_seconds_ago, entry.exit, entry.usage, entry.measured)
        )
    return KeptJob(
        job=entry.job,
        pid=entry.pid,
        since=time.monotonic() - entry.age_seconds,
        exit=end,
        stdout=stdout,
        stderr=stderr,
        network_end=entry.network_end,
        asked=None if entry.asked is None else _asked_from(entry.asked),
    )


def usage_from(usage: accounting.ScopeUsage) -> Usage:
    """The usage that the service records, of the numbers of a job's control groups."""
    numbers = usage._asdict()
    return Usage(processes=numbers.pop("pids"), **numbers)


def _asked_from(asked: EndRequestReport) -> EarlierEndRequest:
    now = time.monotonic()
    return EarlierEndRequest(
        cause=asked.cause,
        first_at=now - asked.seconds_ago,
        kill_at=now + asked.kill_in_seconds,
        signals=frozenset(asked.signals),
    )


def _want_from(want: str | None, usage: Usage) -> Want:
    """Which memory was short. If an earlier launcher does not report it: the job's own limit."""
    match want:
        case "" | "host" | "kernel":
            return want
    return "limit" if usage.oom_kills else ""
