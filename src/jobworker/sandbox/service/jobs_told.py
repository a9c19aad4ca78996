"""What the launcher tells of a job: how it ended, and what it was when a service took it over.

The launcher says of a moment how long ago it was. That is made a time of this host's monotonic
clock at once (time.monotonic), since much may pass before somebody asks.
"""

import time

from attrs import Factory, frozen

from jobworker.model.job import Usage
from jobworker.sandbox.cgroup import scope
from jobworker.sandbox.cgroup.scope import Want
from jobworker.sandbox.protocol.asks import AskedFor
from jobworker.sandbox.protocol.events import Ended
from jobworker.sandbox.protocol.replies import JobEntry


@frozen(kw_only=True)
class Exit:
    """How a job's first process ended: its code, or the signal that ended it."""

    code: int | None
    signal: int | None
    usage: Usage | None
    """None where it could not be read."""
    lost: tuple[str, ...] = ()
    """Where it lost some of what it wrote: names of volumes, "" for its own disk."""
    unseen: tuple[str, ...] = ()
    """Names of volumes of which that could not be found out."""
    want: Want = ""
    """For want of what memory processes of it were killed."""
    ended_at: float = Factory(time.monotonic)

    @property
    def seconds_ago(self) -> float:
        """How long ago it ended."""
        return time.monotonic() - self.ended_at


@frozen(kw_only=True)
class AskedBefore:
    """What an earlier service has asked for of a job's end: see `sandbox.protocol.asks`."""

    cause: str
    first_at: float
    kill_at: float
    signals: frozenset[int]
    """The signals that were sent for it."""

    @property
    def seconds_ago(self) -> float:
        """How long ago that was asked for first."""
        return time.monotonic() - self.first_at

    @property
    def kill_in_seconds(self) -> float:
        """When the job is to be killed; negative where that was due already."""
        return self.kill_at - time.monotonic()


@frozen(kw_only=True)
class Listed:
    """A job that the launcher has kept, and the read ends of its pipes."""

    job: int
    pid: int
    since: float
    """When its program was started."""
    exit: Exit | None
    """None while it lives."""
    stdout: int
    stderr: int
    network_end: str = ""
    """Why it lost its private network, if it did."""
    asked: AskedBefore | None = None
    """None where nobody asked for its end, or an earlier launcher did not keep that."""


def exit_from(told: Ended) -> Exit:
    """How a job ended, as the launcher has told it."""
    used = usage_from(told.usage)
    return Exit(
        code=told.how.code,
        signal=told.how.signal,
        usage=used if told.measured else None,
        lost=told.how.lost,
        unseen=told.how.unseen,
        want=_want_from(told.how.want, used),
        ended_at=time.monotonic() - told.seconds_ago,
    )


def listed_from(told: JobEntry, stdout: int, stderr: int) -> Listed:
    """A job as the launcher has listed it, and the read ends of its pipes."""
    end = None
    if told.exit is not None:
        end = exit_from(
            Ended(told.job, told.ended_seconds_ago, told.exit, told.usage, told.measured)
        )
    return Listed(
        job=told.job,
        pid=told.pid,
        since=time.monotonic() - told.age_seconds,
        exit=end,
        stdout=stdout,
        stderr=stderr,
        network_end=told.network_end,
        asked=None if told.asked is None else _asked_from(told.asked),
    )


def usage_from(told: scope.Usage) -> Usage:
    """What a job has used, as the launcher has told it."""
    numbers = told._asdict()
    return Usage(processes=numbers.pop("pids"), **numbers)


def _asked_from(told: AskedFor) -> AskedBefore:
    now = time.monotonic()
    return AskedBefore(
        cause=told.cause,
        first_at=now - told.seconds_ago,
        kill_at=now + told.kill_in_seconds,
        signals=frozenset(told.signals),
    )


def _want_from(told: str | None, usage: Usage) -> Want:
    """What an earlier launcher does not tell is taken for the job's own limit."""
    match told:
        case "" | "host" | "kernel":
            return told
    return "limit" if usage.oom_kills else ""
