"""What the service may ask of the launcher, checked as if the service were hostile.

A closed set: one class for each request, and `parse`. Every field is checked for type
and bound here, so that the launcher acts only on values that it would itself have chosen. There
is no request for a process without a sandbox.

Pure, standard library only. Each parser raises ProtocolError, which names the field.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from jobworker.errors import ProtocolError
from jobworker.sandbox.cgroup.hierarchy import Limits
from jobworker.sandbox.protocol.asks import CAUSES, Ask
from jobworker.sandbox.start.plan import Order
from jobworker.storage import (
    MAX_DISK_BYTES,
    MAX_VOLUMES,
    MIN_DISK_BYTES,
    name_fault,
    place_fault,
)

MAX_ARGUMENTS = 16_384
MAX_TEXT_BYTES = 131_071
MAX_ORDER_BYTES = 1 << 20
MAX_NUMBER = 1 << 52
MAX_JOB = MAX_NUMBER
"""The highest id of a job: the service gives none beyond, and a request with one is refused."""
MAX_SIGNAL = 64
MAX_ID = 65_535
MAX_CORES_LENGTH = 1024
_CORES = r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*"
NETWORKS = ("host", "none", "private")


class Spawn(NamedTuple):
    """Start a job."""

    job: int
    order: Order
    limits: Limits


class PlanOf(NamedTuple):
    """Tell by which steps a job would be started, and start nothing."""

    order: Order
    limits: Limits


class Signal(NamedTuple):
    """Send a signal to a job's first process."""

    job: int
    number: int
    ask: Ask | None = None
    """Why, which the launcher keeps; a service of before does not tell."""


class Kill(NamedTuple):
    """End every process of a job."""

    job: int
    ask: Ask | None = None


class GiveUpStart(NamedTuple):
    """Kill what is to become a job, unless its program runs already: the spawn is refused then."""

    job: int


class Remove(NamedTuple):
    """Forget a job, with its scope and its files; one that has not ended is killed."""

    job: int


class UsageOf(NamedTuple):
    """Read what a job has used."""

    job: int


class ListJobs(NamedTuple):
    """Tell of jobs with ids above `after`, a page of them, with their pipes."""

    after: int


class Hello(NamedTuple):
    """Tell the version of the protocol that the service speaks: before any other request."""

    protocol: int


class Ping(NamedTuple):
    """Answer."""


class TimesOfTurns(NamedTuple):
    """Tell how long turns of the launcher's loop have taken since this was last asked."""


class PromisedBytes(NamedTuple):
    """Tell how much may still be written to the disks and thin volumes of live jobs."""


class MakeVolume(NamedTuple):
    """Make a volume of a size in bytes, which is reserved unless it is thin."""

    name: str
    size: int
    thin: bool


class RemoveVolume(NamedTuple):
    """Remove a volume that no job has."""

    name: str


class ListVolumes(NamedTuple):
    """Tell of all volumes."""


VolumeRequest = MakeVolume | RemoveVolume | ListVolumes
OfAJob = Spawn | GiveUpStart | Signal | Kill | Remove | UsageOf
Question = PlanOf | ListJobs | TimesOfTurns | PromisedBytes | Ping
Request = VolumeRequest | OfAJob | Question | Hello

_OF_A_JOB: dict[str, type[GiveUpStart | Remove | UsageOf]] = {
    "give_up": GiveUpStart,
    "remove": Remove,
    "usage": UsageOf,
}


_WITHOUT_FIELDS: dict[str, type[TimesOfTurns | PromisedBytes | Ping]] = {
    "turns": TimesOfTurns,
    "promised": PromisedBytes,
    "ping": Ping,
}
_START = frozenset({*Order._fields, *Limits._fields})
_FIELDS: dict[str, frozenset[str]] = {
    "hello": frozenset({"protocol"}),
    "list": frozenset({"after"}),
    "plan": _START,
    "spawn": _START,
    "kill": frozenset(Ask._fields),
    "signal": frozenset({"signal", *Ask._fields}),
    "volume.create": frozenset({"name", "size_bytes", "thin"}),
    "volume.remove": frozenset({"name"}),
}
"""What a request may say besides `id`, `op` and `job`."""


def _known_fields(operation: object) -> frozenset[str]:
    own = _FIELDS.get(operation, frozenset()) if isinstance(operation, str) else frozenset()
    return own | {"id", "op", "job"}


def parse(message: Mapping[str, object]) -> tuple[int, Request]:
    """The number of the request, for the reply, and the request itself."""
    parsed = _parse(message)
    unknown = sorted(message.keys() - _known_fields(message["op"]))
    if unknown:  # what it asks for would be left out without a word
        raise ProtocolError(f"cannot take the request: it knows no field {unknown[0][:64]!r}")
    return parsed


def _parse(message: Mapping[str, object]) -> tuple[int, Request]:
    number = _integer(message, "id", 0)
    operation = message.get("op")
    general = _general_request(operation, message)
    if general is not None:
        return number, general
    job = _integer(message, "job", 1, MAX_JOB)
    if operation == "spawn":
        return number, Spawn(job, _order(message), _limits(message))
    if operation == "signal":
        return number, Signal(job, _integer(message, "signal", 1, MAX_SIGNAL), _ask(message))
    if operation == "kill":
        return number, Kill(job, _ask(message))
    if type(operation) is str and operation in _OF_A_JOB:
        return number, _OF_A_JOB[operation](job)
    raise ProtocolError("cannot take the request: op is none of the launcher's operations")


def _general_request(
    operation: object, message: Mapping[str, object]
) -> VolumeRequest | Question | Hello | None:
    """The request where it is about no job in particular, else None."""
    if operation == "list":
        return ListJobs(_integer(message, "after", 0))
    if operation == "hello":
        return Hello(_integer(message, "protocol", 0))
    if type(operation) is str and operation in _WITHOUT_FIELDS:
        return _WITHOUT_FIELDS[operation]()
    if operation == "plan":
        return PlanOf(_order(message), _limits(message))
    if isinstance(operation, str) and operation.startswith("volume."):
        return _volume_request(operation, message)
    return None


def _volume_request(operation: str, message: Mapping[str, object]) -> VolumeRequest:
    if operation == "volume.list":
        return ListVolumes()
    name = _text(message.get("name"), "name")
    if name_fault(name):
        raise ProtocolError("cannot take the request: name is no name")
    if operation == "volume.remove":
        return RemoveVolume(name)
    if operation == "volume.create":
        size, thin = (
            _integer(message, "size_bytes", MIN_DISK_BYTES, MAX_DISK_BYTES),
            message.get("thin"),
        )
        if type(thin) is not bool:
            raise ProtocolError("cannot take the request: thin is neither true nor false")
        return MakeVolume(name, size, thin)
    raise ProtocolError("cannot take the request: op is none of the launcher's operations")


def _integer(message: Mapping[str, object], key: str, low: int, high: int = MAX_NUMBER) -> int:
    value = message.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ProtocolError(f"cannot take the request: {key} is no integer from {low} to {high}")
    return value


def _text(value: object, key: str) -> str:
    if type(value) is not str or "\0" in value:
        raise ProtocolError(f"cannot take the request: {key} is no text without NUL")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        size = MAX_TEXT_BYTES + 1
    if size > MAX_TEXT_BYTES:
        raise ProtocolError(f"cannot take the request: {key} is too long or no Unicode")
    return value


def _ask(message: Mapping[str, object]) -> Ask | None:
    if not any(field in message for field in Ask._fields):
        return None
    cause = _text(message.get("cause"), "cause")
    if cause not in CAUSES:
        raise ProtocolError(
            f"cannot take the request: cause is none of {', '.join(sorted(CAUSES))}"
        )
    return Ask(cause, _integer(message, "kill_in_ms", 0))


def _order(message: Mapping[str, object]) -> Order:
    arguments = message.get("arguments")
    environment = message.get("environment")
    if type(arguments) is not list or not 1 <= len(arguments) <= MAX_ARGUMENTS:
        raise ProtocolError("cannot take the request: arguments is no list of 1 to 16384 texts")
    if type(environment) is not dict:
        raise ProtocolError("cannot take the request: environment is no object")
    texts = tuple(_text(argument, "an argument") for argument in arguments)
    variables = {_text(k, "a variable"): _text(v, "a value") for k, v in environment.items()}
    if not texts[0] or any(not name or "=" in name for name in variables):
        raise ProtocolError("cannot take the request: a program or variable without a name")
    size = sum(len(text.encode()) + 1 for text in (*texts, *variables, *variables.values()))
    if size > MAX_ORDER_BYTES:
        raise ProtocolError("cannot take the request: arguments and environment exceed 1 MiB")
    hostname = _text(message.get("hostname"), "hostname")
    if not 1 <= len(hostname.encode()) <= 63:
        raise ProtocolError("cannot take the request: hostname is not of 1 to 63 bytes")
    workdir = _text(message.get("workdir"), "workdir")
    if workdir and not workdir.startswith("/"):
        raise ProtocolError("cannot take the request: workdir is not absolute")
    network = _text(message.get("network"), "network")
    if network not in NETWORKS:
        raise ProtocolError(f"cannot take the request: network is none of {', '.join(NETWORKS)}")
    uid, gid = _integer(message, "uid", 0, MAX_ID), _integer(message, "gid", 0, MAX_ID)
    disk = _integer(message, "disk_bytes", 0, MAX_DISK_BYTES)
    if 0 < disk < MIN_DISK_BYTES:
        raise ProtocolError("cannot take the request: disk_bytes is too small for a disk")
    runtime = _text(message.get("runtime"), "runtime")
    if runtime and name_fault(runtime):
        raise ProtocolError("cannot take the request: runtime is no name")
    volumes = _volumes(message.get("volumes"))
    init = message.get("init")
    if type(init) is not bool:
        raise ProtocolError("cannot take the request: init is neither true nor false")
    return Order(
        hostname=hostname,
        arguments=texts,
        environment=variables,
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
        raise ProtocolError("cannot take the request: volumes is no list of at most 16 volumes")
    found: list[tuple[str, str]] = []
    for pair in value:
        if type(pair) is not list or len(pair) != 2:
            raise ProtocolError("cannot take the request: a volume is no name and place")
        name, place = _text(pair[0], "a volume"), _text(pair[1], "a place")
        if name_fault(name) or place_fault(place):
            raise ProtocolError("cannot take the request: a volume's name or place is none")
        for other, taken in found:
            if (
                name == other
                or f"{place}/".startswith(f"{taken}/")
                or f"{taken}/".startswith(f"{place}/")
            ):
                raise ProtocolError("cannot take the request: volumes stand in each other's way")
        found.append((name, place))
    return tuple(found)


def _limits(message: Mapping[str, object]) -> Limits:
    return Limits(
        cpu_percent=_integer(message, "cpu_percent", 0),
        memory_bytes=_integer(message, "memory_bytes", 0),
        io_bps=_integer(message, "io_bps", 0),
        pids=_integer(message, "pids", 0),
        cores=_cores(message.get("cores")),
    )


def _cores(value: object) -> str:
    text = _text(value, "cores")
    if text and not (len(text) <= MAX_CORES_LENGTH and re.fullmatch(_CORES, text)):
        raise ProtocolError("cannot take the request: cores is no list of cores")
    return text
