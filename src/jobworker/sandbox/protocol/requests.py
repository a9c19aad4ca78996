"""The service's requests to the launcher, checked as if the service were hostile.

There is one class for each request, and one `Field` for each value in it. A field checks type and
bounds, so the launcher acts only on values that it would itself have chosen. The table of
`sandbox.protocol.operations` lists the fields of each request. The set of requests is closed, and
no request starts a process without a sandbox.

Pure, standard library only. Each field raises Malformed, which names the member.
"""

from typing import NamedTuple

from jobworker.core_list import is_core_list
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits
from jobworker.sandbox.protocol import fields as f
from jobworker.sandbox.protocol.end_requests import CAUSES, EndRequest
from jobworker.sandbox.start.plan import Order
from jobworker.storage import (
    MAX_DISK_BYTES,
    MAX_VOLUMES,
    MIN_DISK_BYTES,
    MIN_MEMORY_BYTES,
    name_fault,
    place_fault,
)

MAX_ARGUMENTS = 16_384
MAX_VARIABLES = 49_153
"""The most variables of an order: the client's (`model.job.MAX_VARIABLES`) and the job's id."""
MAX_TEXT_BYTES = 131_071
MAX_ORDER_BYTES = 1 << 20
MAX_NUMBER = 1 << 52
MAX_JOB = MAX_NUMBER
"""The highest id of a job. The service assigns no higher one, and the launcher refuses it."""
MAX_SIGNAL = 64
MAX_HOSTNAME_BYTES = 63
"""One label of a host name: RFC 1035, 2.3.4. The kernel takes 64: uname(2)."""
MAX_ID = 65_535
NETWORKS = ("host", "none", "private")


class Spawn(NamedTuple):
    """Start a job."""

    job: int
    order: Order
    limits: ScopeLimits


class PlanOf(NamedTuple):
    """List the steps by which a job would be started, and start nothing."""

    order: Order
    limits: ScopeLimits


class Signal(NamedTuple):
    """Send a signal to a job's first process."""

    job: int
    number: int
    ask: EndRequest | None = None
    """Why the signal is sent; the launcher keeps it. A service of an earlier version sends none."""


class Kill(NamedTuple):
    """End every process of a job."""

    job: int
    ask: EndRequest | None = None


class GiveUpStart(NamedTuple):
    """Kill a job whose program does not run yet; the launcher then refuses its Spawn request."""

    job: int


class Remove(NamedTuple):
    """Remove a job with its scope and its files; a job that has not ended is killed."""

    job: int


class UsageOf(NamedTuple):
    """Read a job's resource usage."""

    job: int


class ListJobs(NamedTuple):
    """List a page of the jobs with ids above `after`, with their pipes."""

    after: int


class Hello(NamedTuple):
    """Announce the service's version of the protocol, before any other request."""

    protocol: int


class Ping(NamedTuple):
    """Check that the launcher answers."""


class TimesOfTurns(NamedTuple):
    """Read how long turns of the launcher's loop have taken since the last such request."""


class PromisedBytes(NamedTuple):
    """Read how many bytes live jobs may still write to their disks and thin volumes."""


class MakeVolume(NamedTuple):
    """Make a volume of `size` bytes; they are reserved on the host's disk unless it is thin."""

    name: str
    size: int
    thin: bool


class RemoveVolume(NamedTuple):
    """Remove a volume that no job has."""

    name: str


class ListVolumes(NamedTuple):
    """List all volumes."""


VolumeRequest = MakeVolume | RemoveVolume | ListVolumes
_OfAJob = Spawn | GiveUpStart | Signal | Kill | Remove | UsageOf
Request = Hello | Ping | _OfAJob | PlanOf | ListJobs | TimesOfTurns | PromisedBytes | VolumeRequest


def _text(value: object, key: str) -> str:
    if type(value) is not str or "\0" in value:
        raise f.Malformed(f"{key} is no text without NUL")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        size = MAX_TEXT_BYTES + 1
    if size > MAX_TEXT_BYTES:
        raise f.Malformed(f"{key} is too long or no Unicode")
    return value


def _texts(values: object, most: int) -> list[str]:
    """Check that `values` is a list of at most `most` texts without NUL, and return it.

    The texts are checked together: one by one, 45,000 texts take 40 ms of the loop.
    """
    if type(values) is not list or len(values) > most or not set(map(type, values)) <= {str}:
        raise f.Malformed(f"the arguments or variables are no list of at most {most} texts")
    if max(map(len, values), default=0) > MAX_TEXT_BYTES // 4:
        return [_text(value, "an argument or variable") for value in values]
    together = "".join(values)
    if "\0" in together or not (together.isascii() or _is_unicode(together)):
        raise f.Malformed("an argument or variable has a NUL or is no Unicode")
    return values


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: a lone surrogate is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bytes_of(texts: list[str]) -> int:
    """The bytes of texts as C strings, each with its closing NUL."""
    return len("".join(texts).encode()) + len(texts)


def _number(message: f.Object, key: str, high: int = MAX_NUMBER) -> int:
    return f.as_integer(message.get(key), key, 0, high)


def _ask(message: f.Object) -> EndRequest | None:
    if not any(field in message for field in EndRequest._fields):
        return None
    cause = _text(message.get("cause"), "cause")
    if cause not in CAUSES:
        raise f.Malformed(f"cause is none of {', '.join(sorted(CAUSES))}")
    return EndRequest(cause, _number(message, "kill_in_ms"))


def _order(message: f.Object) -> Order:
    arguments = _texts(message.get("arguments"), MAX_ARGUMENTS)
    environment = message.get("environment")
    if type(environment) is not dict:
        raise f.Malformed("environment is no object")
    names = _texts(list(environment), MAX_VARIABLES)
    values = _texts(list(environment.values()), MAX_VARIABLES)
    if not arguments or not arguments[0] or "" in environment or "=" in "".join(names):
        raise f.Malformed("no arguments, or a program or variable without a name")
    if sum(map(_bytes_of, (arguments, names, values))) > MAX_ORDER_BYTES:
        raise f.Malformed("arguments and environment exceed 1 MiB")
    hostname = _text(message.get("hostname"), "hostname")
    if not 1 <= len(hostname.encode()) <= MAX_HOSTNAME_BYTES:
        raise f.Malformed(f"hostname is not of 1 to {MAX_HOSTNAME_BYTES} bytes")
    workdir = _text(message.get("workdir"), "workdir")
    if workdir and not workdir.startswith("/"):
        raise f.Malformed("workdir is not absolute")
    network = _text(message.get("network"), "network")
    if network not in NETWORKS:
        raise f.Malformed(f"network is none of {', '.join(NETWORKS)}")
    uid, gid = _number(message, "uid", MAX_ID), _number(message, "gid", MAX_ID)
    disk = _number(message, "disk_bytes", MAX_DISK_BYTES)
    if 0 < disk < MIN_DISK_BYTES:
        raise f.Malformed("disk_bytes is too small for a disk")
    runtime = _text(message.get("runtime"), "runtime")
    if runtime and name_fault(runtime):
        raise f.Malformed("runtime is no name")
    volumes = _volumes(message.get("volumes"))
    init = message.get("init")
    if type(init) is not bool:
        raise f.Malformed("init is neither true nor false")
    return Order(
        hostname=hostname,
        arguments=tuple(arguments),
        environment=environment,
        workdir=workdir,
        network=network,
        uid=uid,
        gid=gid,
        disk_bytes=disk,
        runtime=runtime,
        volumes=volumes,
        init=init,
    )


def _volumes(value: object) -> tuple[tuple[str, str], ...]:
    if type(value) is not list or len(value) > MAX_VOLUMES:
        raise f.Malformed("volumes is no list of at most 16 volumes")
    found: list[tuple[str, str]] = []
    for pair in value:
        if type(pair) is not list or len(pair) != 2:
            raise f.Malformed("a volume is no pair of name and place")
        name, place = _text(pair[0], "a volume"), _text(pair[1], "a place")
        if name_fault(name) or place_fault(place):
            raise f.Malformed("a volume's name or place is invalid")
        for other, taken in found:
            if (
                name == other
                or f"{place}/".startswith(f"{taken}/")
                or f"{taken}/".startswith(f"{place}/")
            ):
                raise f.Malformed("two volumes have the same name, or places inside each other")
        found.append((name, place))
    return tuple(found)


def _limits(message: f.Object) -> ScopeLimits:
    memory = _number(message, "memory_bytes")
    if 0 < memory < MIN_MEMORY_BYTES:
        raise f.Malformed("memory_bytes is too small for a job")
    return ScopeLimits(
        cpu_percent=_number(message, "cpu_percent"),
        memory_bytes=memory,
        io_bps=_number(message, "io_bps"),
        pids=_number(message, "pids"),
        cores=_cores(message.get("cores")),
    )


def _cores(value: object) -> str:
    text = _text(value, "cores")
    if text and not is_core_list(text):
        raise f.Malformed("cores is no list of cores")
    return text


def _volume_name(value: object, key: str) -> str:
    name = _text(value, key)
    if name_fault(name):
        raise f.Malformed(f"{key} is no name")
    return name


def _order_members(order: Order) -> f.Object:
    return {
        **order._asdict(),
        "arguments": list(order.arguments),
        "environment": dict(order.environment),
        "volumes": [list(volume) for volume in order.volumes],
    }


JOB = f.integer("job", 1, MAX_JOB)
ORDER = f.Field(Order._fields, _order, _order_members)
LIMITS = f.Field(ScopeLimits._fields, _limits, ScopeLimits._asdict)
ASK = f.Field(EndRequest._fields, _ask, lambda ask: {} if ask is None else ask._asdict())
SIGNAL = f.integer("signal", 1, MAX_SIGNAL)
AFTER = f.integer("after", 0, MAX_NUMBER)
VERSION = f.integer("protocol", 0, MAX_NUMBER)
VOLUME_NAME = f.member("name", _volume_name)
VOLUME_SIZE = f.integer("size_bytes", MIN_DISK_BYTES, MAX_DISK_BYTES)
THIN = f.flag("thin")
