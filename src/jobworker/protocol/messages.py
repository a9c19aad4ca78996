"""The contents of messages: the parameters and results of each method.

These are frozen attrs classes, which `convert` makes from JSON and back, so they are the schema.
The classes of a job are in `model`. Names on the wire are the names here.
"""

from collections.abc import Mapping
from datetime import datetime
from enum import Enum

from attrs import field, frozen

from jobworker.model.bounds import at_most, within
from jobworker.model.checked_classes import raises_invalid_params
from jobworker.model.job import (
    MAX_TIMEOUT_SECONDS,
    JobId,
    JobRecord,
    JobSpec,
    Limits,
    Stream,
    check_job_name,
)
from jobworker.model.labels import check_labels
from jobworker.model.lifecycle import State
from jobworker.model.volumes import Volume, check_name
from jobworker.storage import MAX_DISK_BYTES, MIN_DISK_BYTES

MAX_LIST = 1000
MAX_OFFSET = 1 << 62
MAX_CREDIT_BYTES = 1 << 30
MAX_TAIL_LINES = 1 << 31


class Encoding(Enum):
    """How the bytes of output are encoded."""

    BASE64 = "base64"
    """In `job.output` notifications, as base64 (RFC 4648) in `data`."""
    TEXT = "text"
    """In `job.output` notifications, as text in `text`; bytes that are not UTF-8 become U+FFFD."""
    BINARY = "binary"
    """In binary messages: the notification without `data` as one line of JSON, then the bytes."""


@frozen(kw_only=True)
class Delivery:
    """How the server sends a subscription's output."""

    encoding: Encoding = Encoding.BASE64
    credit_bytes: int | None = field(default=None, validator=within(0, MAX_CREDIT_BYTES))
    """Bytes that may be sent before the first `job.credit`; null sends as fast as you read."""


@frozen(kw_only=True)
class RunParams:
    """Run a command as a job."""

    job: JobSpec
    follow: Delivery | None = None
    """Subscribe to the output from its first byte, as `job.log` would."""


@frozen(kw_only=True)
class RunResult:
    """A summary of the admitted job, and the subscription that `follow` has opened."""

    job: JobRecord
    subscription: int | None = None
    """Null without `follow`, or if the output cannot be followed, such as when the service ends."""


@frozen(kw_only=True)
class PlanParams:
    """Return how a command would be run as a job; run nothing."""

    job: JobSpec


@frozen(kw_only=True)
class PlannedStep:
    """One step of a job's start, in the order in which they are applied."""

    name: str
    subject: str
    """The object of the step, mostly a path; it may be empty."""
    explanation: str


@frozen(kw_only=True)
class Plan:
    """The limits that the job would have, and the steps of its start."""

    limits: Limits
    steps: tuple[PlannedStep, ...]


@frozen(kw_only=True)
class JobParams:
    """Name one job."""

    id: JobId = field(validator=within(1, MAX_OFFSET))


@frozen(kw_only=True)
class StopParams:
    """Stop a job: a signal, a grace period, SIGKILL for all processes that are left."""

    id: JobId = field(validator=within(1, MAX_OFFSET))
    signal: str = "TERM"
    grace_seconds: float | None = field(default=None, validator=within(0, MAX_TIMEOUT_SECONDS))


@frozen(kw_only=True)
class ListParams:
    """List jobs, newest first."""

    states: tuple[State, ...] = field(default=(), validator=at_most(len(State)))
    """Only jobs in these states; empty is all."""
    labels: Mapping[str, str] = field(factory=dict, validator=check_labels)
    """Only jobs with all of these labels."""
    name: str = field(default="", validator=check_job_name)
    """Only jobs of this name; empty is all."""
    limit: int = field(default=100, validator=within(1, MAX_LIST))
    # Not a JobId: it need not be the id of a job.
    before: int | None = field(default=None, validator=within(1, MAX_OFFSET))
    """Only jobs with smaller ids: `next` of the page before."""


@frozen(kw_only=True)
class ListResult:
    """A page of summaries; it has fewer than `limit`, perhaps none, if the search was long."""

    jobs: tuple[JobRecord, ...]
    next: int | None = None
    """The value of `before` for the next page; null is the end."""


@frozen(kw_only=True)
class RemoveParams:
    """Remove an ended job: its output and its record."""

    id: JobId = field(validator=within(1, MAX_OFFSET))
    force: bool = False
    """Kill the job first if it has not ended, and remove it even if its output is followed."""


@raises_invalid_params
@frozen(kw_only=True)
class PruneParams:
    """Remove ended jobs' output, the oldest first; without parameters, by the configuration.

    The jobs' records stay. Output that is followed stays too.
    """

    older_than_seconds: float | None = field(default=None, validator=within(0, MAX_TIMEOUT_SECONDS))
    """Remove output of jobs that ended longer ago. A jump of the clock counts after a day."""
    keep_jobs: int | None = field(default=None, validator=within(0, MAX_OFFSET))
    """Remove all output but that of the last `keep_jobs` jobs."""
    keep_bytes: int | None = field(default=None, validator=within(0, MAX_OFFSET))
    """Remove the oldest output until all output together has at most `keep_bytes` bytes."""


@frozen(kw_only=True)
class Removed:
    """The jobs that were removed, or whose output was."""

    jobs: tuple[JobId, ...]
    bytes: int
    """Size of their output on the disk."""


@frozen(kw_only=True)
class StreamStart:
    """The start of one stream: the first whole line that meets both conditions."""

    stream: Stream
    offset: int = field(default=0, validator=within(0, MAX_OFFSET))
    """Position in this stream alone: the line's first byte is there or later."""
    since: datetime | None = None
    """The line's first byte was read from the job at this time or later."""


@frozen(kw_only=True)
class LogParams:
    """Subscribe to a job's output."""

    id: JobId = field(validator=within(1, MAX_OFFSET))
    follow: bool = True
    """Go on until the job's last byte; else end after the bytes that exist now."""
    offset: int = field(default=0, validator=within(0, MAX_OFFSET))
    """Start at this byte of both streams together. Of all given starts, the latest counts."""
    tail_lines: int | None = field(default=None, validator=within(0, MAX_TAIL_LINES))
    """Only the last `tail_lines` lines of `streams`, and all lines that begin later."""
    since: datetime | None = None
    """Only lines whose first byte was read from the job at this time or later."""
    since_seconds: float | None = field(default=None, validator=within(0, MAX_TIMEOUT_SECONDS))
    """The same as a duration before now, by the server's clock."""
    starts: tuple[StreamStart, ...] = field(factory=tuple, validator=at_most(len(Stream)))
    """To resume: the `starts` of the `job.log` result, for streams without output so far."""
    streams: tuple[Stream, ...] = field(
        default=(Stream.STDOUT, Stream.STDERR), validator=at_most(len(Stream))
    )
    coalesce: bool = True
    """Join bytes that were written at different times; else each piece has bytes of one time."""
    delivery: Delivery = Delivery()


@frozen(kw_only=True)
class LogResult:
    """The number in the subscription's notifications, and where the output begins."""

    subscription: int
    offset: int
    """Position in both streams together: resume here if no output arrives before a break."""
    starts: tuple[StreamStart, ...] = ()
    """The first line of each stream that does not begin at `offset`."""


Opening = RunResult | LogResult
"""The results of calls that may open a subscription; a test checks that there are no others."""


def opened_by(result: object) -> int | None:
    """Return the number of the subscription that a call with this result has opened, or None."""
    return result.subscription if isinstance(result, Opening) else None


@frozen(kw_only=True)
class CreditParams:
    """Grant a subscription more bytes of output (a notification)."""

    subscription: int
    bytes: int = field(validator=within(1, MAX_CREDIT_BYTES))


@frozen(kw_only=True)
class SubscriptionParams:
    """Name one subscription of this connection."""

    subscription: int


@frozen(kw_only=True)
class Nothing:
    """No parameters, or an empty result."""


@frozen(kw_only=True)
class Discovery:
    """An OpenRPC document: methods, notifications, errors, and the schemas of all of them."""

    openrpc: str
    info: Mapping[str, object]
    methods: tuple[Mapping[str, object], ...]
    components: Mapping[str, object]


@frozen(kw_only=True)
class Welcome:
    """The server's version, and the caller's name and role."""

    version: str
    name: str
    role: str


@frozen(kw_only=True)
class OutputHeader:
    """A piece of output, without its bytes: `job.output`."""

    subscription: int
    stream: Stream
    offset: int
    """Position of its first byte in both streams together."""
    time: datetime
    """When its first byte was read from the job."""


@frozen(kw_only=True)
class OutputEnd:
    """The end of a subscription: `job.output_end`."""

    subscription: int
    offset: int
    """The offset at which a later subscription resumes."""
    job: JobRecord
    """A summary of the job."""
    error: Mapping[str, str] | None = None
    """`name` and `message`, if the output could not be sent to its end or the job was removed."""


@frozen(kw_only=True)
class VolumeSpec:
    """The request for a new volume."""

    name: str = field(validator=check_name)
    size_bytes: int = field(validator=within(MIN_DISK_BYTES, MAX_DISK_BYTES))
    thin: bool = False
    """Do not reserve the size on the server's disk: use only the space that is written."""


@frozen(kw_only=True)
class VolumeParams:
    """Name one volume."""

    name: str = field(validator=check_name)


@frozen(kw_only=True)
class Volumes:
    """All volumes, by name."""

    volumes: tuple[Volume, ...]
