"""What travels in the messages: the parameters and results of each method.

Frozen attrs classes; `convert` makes them of JSON and back, so these classes are the schema.
Whatever is a job's own stands in `model`. Names on the wire are the names here.
"""

from collections.abc import Mapping
from datetime import datetime
from enum import Enum

from attrs import field, frozen

from jobworker.model.bounds import at_most, within
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
from jobworker.model.made import told
from jobworker.model.volumes import Volume, check_name
from jobworker.storage import MAX_DISK_BYTES, MIN_DISK_BYTES

MAX_LIST = 1000
MAX_OFFSET = 1 << 62
MAX_CREDIT_BYTES = 1 << 30
MAX_TAIL_LINES = 1 << 31


class Encoding(Enum):
    """How output bytes travel."""

    BASE64 = "base64"
    """In `job.output` notifications, as base64 (RFC 4648) in `data`."""
    TEXT = "text"
    """In `job.output` notifications, as text in `text`: UTF-8, with U+FFFD for what is none."""
    BINARY = "binary"
    """In binary messages: the notification without `data` as one line of JSON, then the bytes."""


@frozen(kw_only=True)
class Delivery:
    """How a subscription's output is to be sent."""

    encoding: Encoding = Encoding.BASE64
    credit_bytes: int | None = field(default=None, validator=within(0, MAX_CREDIT_BYTES))
    """Bytes that may be sent before the first `job.credit`; null sends as fast as is read."""


@frozen(kw_only=True)
class RunParams:
    """Run a command as a job."""

    job: JobSpec
    follow: Delivery | None = None
    """Subscribe to the output from its first byte, as `job.log` would."""


@frozen(kw_only=True)
class RunResult:
    """A summary of the job as admitted, and the subscription that `follow` asked for."""

    job: JobRecord
    subscription: int | None = None
    """Null also where the output could not be followed at once: the service ends, say."""


@frozen(kw_only=True)
class PlanParams:
    """Tell how a command would be run as a job; nothing is run."""

    job: JobSpec


@frozen(kw_only=True)
class PlannedStep:
    """One step of a job's start, in the order in which they are applied."""

    name: str
    subject: str
    """What it is about, a path mostly; it may be empty."""
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
    """Stop a job: a signal, a grace period, SIGKILL for all that is left."""

    id: JobId = field(validator=within(1, MAX_OFFSET))
    signal: str = "TERM"
    grace_seconds: float | None = field(default=None, validator=within(0, MAX_TIMEOUT_SECONDS))


@frozen(kw_only=True)
class ListParams:
    """List jobs, newest first."""

    states: tuple[State, ...] = field(default=(), validator=at_most(len(State)))
    """Only jobs in these; empty stands for all."""
    labels: Mapping[str, str] = field(factory=dict, validator=check_labels)
    """Only jobs that have all of these."""
    name: str = field(default="", validator=check_job_name)
    """Only jobs of this name; empty stands for all."""
    limit: int = field(default=100, validator=within(1, MAX_LIST))
    before: int | None = field(default=None, validator=within(1, MAX_OFFSET))
    """Only jobs with smaller ids: `next` of the page before. No JobId: it names no job."""


@frozen(kw_only=True)
class ListResult:
    """A page of summaries: fewer than `limit`, perhaps none, where the search was long."""

    jobs: tuple[JobRecord, ...]
    next: int | None = None
    """What to ask for as `before` to go on; null is the end."""


@frozen(kw_only=True)
class RemoveParams:
    """Remove an ended job: its output, and all that is known of it."""

    id: JobId = field(validator=within(1, MAX_OFFSET))
    force: bool = False
    """Kill it first where it has not ended, and remove it though its output is being followed."""


@told
@frozen(kw_only=True)
class PruneParams:
    """Remove ended jobs' output, the oldest first; with nothing given, as the server is configured.

    The jobs' records stay. Output that is being followed stays too.
    """

    older_than_seconds: float | None = field(default=None, validator=within(0, MAX_TIMEOUT_SECONDS))
    """What ended longer ago. A time of day that has jumped counts after a day."""
    keep_jobs: int | None = field(default=None, validator=within(0, MAX_OFFSET))
    """All but that of the last so many."""
    keep_bytes: int | None = field(default=None, validator=within(0, MAX_OFFSET))
    """The oldest, until all output together has no more."""


@frozen(kw_only=True)
class Removed:
    """What was removed."""

    jobs: tuple[JobId, ...]
    bytes: int
    """That their output had on the disk."""


@frozen(kw_only=True)
class StreamStart:
    """Where a stream begins: with a whole line, the first one that is not before."""

    stream: Stream
    offset: int = field(default=0, validator=within(0, MAX_OFFSET))
    """Bytes of this stream alone: the line's first byte stands there or later."""
    since: datetime | None = None
    """The line's first byte was read from the job at this time or later."""


@frozen(kw_only=True)
class LogParams:
    """Subscribe to a job's output."""

    id: JobId = field(validator=within(1, MAX_OFFSET))
    follow: bool = True
    """Go on until the job's last byte; else end with what there is now."""
    offset: int = field(default=0, validator=within(0, MAX_OFFSET))
    """Start at this byte of both streams together; with what follows, at the latest of all."""
    tail_lines: int | None = field(default=None, validator=within(0, MAX_TAIL_LINES))
    """Only the last so many lines of `streams`, and what begins from now on; 0: what comes."""
    since: datetime | None = None
    """Only lines whose first byte was read from the job at this time or later."""
    since_seconds: float | None = field(default=None, validator=within(0, MAX_TIMEOUT_SECONDS))
    """The same, so long ago by the server's clock."""
    starts: tuple[StreamStart, ...] = field(factory=tuple, validator=at_most(len(Stream)))
    """To go on: those that `job.log` answered, of streams of which nothing has come yet."""
    streams: tuple[Stream, ...] = field(
        default=(Stream.STDOUT, Stream.STDERR), validator=at_most(len(Stream))
    )
    coalesce: bool = True
    """Join what was written at different times into one piece; else each has its own time."""
    delivery: Delivery = Delivery()


@frozen(kw_only=True)
class LogResult:
    """The number that the subscription's notifications bear, and where it begins."""

    subscription: int
    offset: int
    """Position in both streams together: where to go on if nothing comes before a break."""
    starts: tuple[StreamStart, ...] = ()
    """With which line each stream begins that does not begin there."""


Opening = RunResult | LogResult
"""The results of calls that may open a subscription; a test holds that there are no others."""


def opened_by(result: object) -> int | None:
    """The number of the subscription that a call with this result has opened, if it has."""
    return result.subscription if isinstance(result, Opening) else None


@frozen(kw_only=True)
class CreditParams:
    """Allow a subscription to send more (a notification)."""

    subscription: int
    bytes: int = field(validator=within(1, MAX_CREDIT_BYTES))


@frozen(kw_only=True)
class SubscriptionParams:
    """Name one subscription of this connection."""

    subscription: int


@frozen(kw_only=True)
class Nothing:
    """No parameters, or nothing to tell."""


@frozen(kw_only=True)
class Discovery:
    """An OpenRPC document: methods, notifications, errors, and the schemas of all of them."""

    openrpc: str
    info: Mapping[str, object]
    methods: tuple[Mapping[str, object], ...]
    components: Mapping[str, object]


@frozen(kw_only=True)
class Welcome:
    """Who the server takes the caller for, and what it is itself."""

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
    """Where a later subscription would go on."""
    job: JobRecord
    """A summary of it."""
    error: Mapping[str, str] | None = None
    """`name` and `message` where the output could not be sent to its end, or the job is gone."""


@frozen(kw_only=True)
class VolumeSpec:
    """A volume to be made."""

    name: str = field(validator=check_name)
    size_bytes: int = field(validator=within(MIN_DISK_BYTES, MAX_DISK_BYTES))
    thin: bool = False
    """Whether it takes what is written to it from the server's disk, and not its size at once."""


@frozen(kw_only=True)
class VolumeParams:
    """A volume by name."""

    name: str = field(validator=check_name)


@frozen(kw_only=True)
class Volumes:
    """All of them."""

    volumes: tuple[Volume, ...]
