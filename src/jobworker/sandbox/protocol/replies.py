"""The launcher's replies to requests, and how the service checks them.

There is one class for each reply, and one `Field` for each value in it. The launcher has root's
rights and the service trusts it, so bounds are few. But the launcher may be of another version or
have a fault, so types are checked: a reply that does not fit raises one error that names the field.

A member that an earlier launcher does not send has a default here. The service ignores an unknown
member, which a later launcher may send.

Pure, standard library only.
"""

from typing import NamedTuple

from jobworker.sandbox.cgroup.accounting import ScopeUsage
from jobworker.sandbox.protocol import fields as f
from jobworker.sandbox.protocol.end_requests import EndRequestReport
from jobworker.storage import MAX_DISK_BYTES, MIN_DISK_BYTES, name_fault


class Done(NamedTuple):
    """The request was done; the reply has no values."""


class Refusal(NamedTuple):
    """The reply to a request that was not served (`sandbox.service.launcher_refusals`)."""

    step: str
    """The step of a start that failed, or a word for a request that was refused as a whole."""
    errno: int
    """0 if the kernel gave no reason."""
    detail: str
    why: str = ""
    """More about the reason, such as how much room a volume lacks."""


class Spawned(NamedTuple):
    """A job's program runs. The read ends of its stdout and stderr come with it."""

    pid: int


class GivenUp(NamedTuple):
    """Whether there was a start under way that the launcher gave up."""

    given_up: bool


class Delivered(NamedTuple):
    """Whether a signal has any effect on the job's first process."""

    delivered: bool


class Steps(NamedTuple):
    """The steps of a start; each is a name, a subject and a sentence about its effect."""

    steps: tuple[tuple[str, str, str], ...]


class Promised(NamedTuple):
    """How many bytes may still be written to disks and thin volumes."""

    bytes: int


class VolumeEntry(NamedTuple):
    """The current state of a volume."""

    name: str
    size_bytes: int
    used_bytes: int
    thin: bool
    jobs: int
    """How many live jobs use it."""


class VolumeEntries(NamedTuple):
    """All volumes, by name."""

    volumes: tuple[VolumeEntry, ...]


class HowEnded(NamedTuple):
    """How a job's first process ended."""

    code: int | None
    signal: int | None
    lost: tuple[str, ...]
    """Where some of the job's writes were lost: names of volumes, "" for its own disk."""
    unseen: tuple[str, ...]
    """Names of volumes for which it is unknown whether writes were lost."""
    want: str | None
    """Which memory ran out when its processes were killed (`cgroup.accounting.Want`). An earlier
    launcher does not send it."""


class JobEntry(NamedTuple):
    """A job whose program was started, and which no service has removed."""

    job: int
    pid: int
    age_seconds: float
    ended_seconds_ago: float
    """Without meaning while the job lives."""
    exit: HowEnded | None
    """None while it lives, and until its volumes were written out."""
    usage: ScopeUsage
    measured: bool
    """Whether `usage` could be read."""
    network_end: str
    """Why the job lost its private network; "" if it did not."""
    asked: EndRequestReport | None


class JobEntries(NamedTuple):
    """A page of jobs, by id. The read ends of each one's stdout and stderr come with it."""

    jobs: tuple[JobEntry, ...]
    more: bool
    """Whether there are jobs with higher ids."""
    unstarted: tuple[int, ...]
    """On the last page, the latest jobs whose program was not executed."""


def _words(value: object, name: str) -> tuple[str, str, str]:
    words = f.as_list(value, name)
    if len(words) != 3:
        raise f.Malformed(f"{name} has a step that is not of three words")
    one, two, three = (f.as_text(word, name) for word in words)
    return one, two, three


def _volume_name(value: object, name: str) -> str:
    word = f.as_text(value, name)
    if name_fault(word):
        raise f.Malformed(f"{name} is no name of a volume")
    return word


def _text_or_none(value: object, _: str) -> str | None:
    return value if type(value) is str else None


def _more(value: object, name: str) -> str:
    return _text_or_none(value, name) or ""


REFUSAL: f.Fields = (
    f.text("step"),
    f.count("errno"),
    f.text("detail"),
    f.member("why", _more),
)
SPAWNED: f.Fields = (f.count("pid"),)
GIVEN_UP: f.Fields = (f.flag("given_up"),)
DELIVERED: f.Fields = (f.flag("delivered"),)
STEPS: f.Fields = (f.many("steps", _words),)
PROMISED: f.Fields = (f.count("bytes"),)
USAGE: f.Fields = tuple(f.optional(f.count(name), 0) for name in ScopeUsage._fields)
TURNS: f.Fields = (
    f.count("turns"),
    f.seconds("longest_ms"),
    f.text("slowest"),
    f.count("over_bound"),
    f.count("incidents"),
)
VOLUMES: f.Fields = (
    f.several(
        "volumes",
        VolumeEntry,
        (
            f.member("name", _volume_name),
            f.integer("size_bytes", MIN_DISK_BYTES, MAX_DISK_BYTES),
            f.optional(f.integer("used_bytes", 0, 1 << 60), 0),
            f.optional(f.flag("thin"), default=False),
            f.optional(f.integer("jobs", 0, 1 << 30), 0),
        ),
    ),
)
HOW_ENDED: f.Fields = (
    f.count_or_null("code"),
    f.count_or_null("signal"),
    f.optional(f.many("lost", f.as_text), ()),
    f.optional(f.many("unseen", f.as_text), ()),
    f.member("want", _text_or_none),
)
SINCE_END = f.optional(f.seconds("ended_seconds_ago"), 0.0)
USED = f.nested("usage", ScopeUsage, USAGE)
MEASURED = f.optional(f.flag("measured"), default=True)
_ASKED: f.Fields = (
    f.text("cause"),
    f.seconds("seconds_ago"),
    f.seconds("kill_in_seconds"),
    f.many("signals", f.as_count),
)
JOBS: f.Fields = (
    f.several(
        "jobs",
        JobEntry,
        (
            f.count("job"),
            f.count("pid"),
            f.seconds("age_seconds"),
            SINCE_END,
            f.nested_or_null("exit", HowEnded, HOW_ENDED),
            f.optional(USED, ScopeUsage()),
            MEASURED,
            f.optional(f.text("network_end"), ""),
            f.optional(f.nested_or_null("asked", EndRequestReport, _ASKED), None),
        ),
    ),
    f.flag("more"),
    f.optional(f.many("unstarted", f.as_count), ()),
)
