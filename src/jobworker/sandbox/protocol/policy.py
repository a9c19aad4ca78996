"""The launcher's policy: the process that starts the launcher sends it once, before any request.

The message has a member for each value, and `carries`, which names the descriptors that come along.
For a launcher that outlives services it also has `service_uid`, the user whose service may connect.
The launcher trusts the process that starts it. But that process may be of another version, or have
a fault. So the launcher refuses a member that is missing, unknown or of another type, and names it,
before it uses any value.

Standard library only.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jobworker.errors import ProtocolError
from jobworker.sandbox.channel import Message
from jobworker.sandbox.protocol import fields as f
from jobworker.sandbox.seccomp import program as bpf


class LauncherPolicy(NamedTuple):
    """The limits, paths, programs and ids for which the launcher was started; they never change."""

    instance: str
    """Name of the directory of control groups that belongs to this service."""
    stage: str
    scratch: str
    volumes: str
    controllers: tuple[str, ...]
    cgroup_parent: str
    programs: tuple[str, ...]
    etc: tuple[str, ...]
    first_uid: int
    max_jobs: int
    spares: int
    tmpfs_bytes: int
    filters: bpf.Filters
    disk_bytes: int
    keep_free_bytes: int
    """The bytes that must stay free on the file system of jobs' disks."""
    overcommit: bool
    """Whether a job's disk takes space only when the job writes, and not its whole size at once."""
    runtimes: Mapping[str, str]
    """Root trees that jobs may ask for, by name."""


MAX_UID = 1 << 32
MAX_PLACES = 1 << 20
"""The most jobs or spares: far above the bounds of the settings."""
MAX_BYTES = 1 << 62


def _filters(message: f.Object) -> bpf.Filters:
    told = f.as_object(message.get("filters"), "filters")
    f.as_flag(told.get("log"), "filters.log")
    return bpf.filters_from(told)


def _runtimes(value: object, name: str) -> dict[str, str]:
    trees = f.as_object(value, name)
    return {runtime: f.as_text(path, f"{name}.{runtime}") for runtime, path in trees.items()}


_FIELDS: f.Fields = (
    *(f.text(name) for name in ("instance", "stage", "scratch", "volumes")),
    f.many("controllers", f.as_text),
    f.text("cgroup_parent"),
    f.many("programs", f.as_text),
    f.many("etc", f.as_text),
    f.integer("first_uid", 0, MAX_UID),
    f.integer("max_jobs", 1, MAX_PLACES),
    f.integer("spares", 0, MAX_PLACES),
    f.integer("tmpfs_bytes", 1, MAX_BYTES),
    f.Field(("filters",), _filters, lambda filters: {"filters": bpf.filters_message(filters)}),
    f.integer("disk_bytes", 1, MAX_BYTES),
    f.integer("keep_free_bytes", 0, MAX_BYTES),
    f.flag("overcommit"),
    f.member("runtimes", _runtimes)._replace(write=lambda trees: {"runtimes": dict(trees)}),
)
_CARRIES, _SERVICE_UID = f.many("carries", f.as_text), f.integer("service_uid", 0, MAX_UID)
_KNOWN = frozenset(n for field in (*_FIELDS, _CARRIES, _SERVICE_UID) for n in field.names)


def policy_from(message: f.Object) -> LauncherPolicy:
    """The policy in the first message. Raises ProtocolError, which names the field."""
    try:
        policy = f.decode(LauncherPolicy, _FIELDS, message)
        if unknown := message.keys() - _KNOWN:  # else it would be dropped silently
            raise f.Malformed(f"it knows no field {min(unknown)[:64]!r}")
    except f.Malformed as fault:
        raise _refused(fault) from None
    return policy


def policy_message(policy: LauncherPolicy) -> Message:
    """The message that `policy_from` reads."""
    return f.encode(_FIELDS, policy)


def carried_in(message: f.Object, passed: Sequence[int]) -> dict[str, int]:
    """The descriptors that came with the policy, by name. Raises ProtocolError."""
    try:
        names = f.decode(_Carried, (_CARRIES,), {"carries": [], **message}).names
        if len(set(names)) != len(passed) or len(names) != len(passed):
            raise f.Malformed(f"carries has other names than one for each of {len(passed)}")
    except f.Malformed as fault:
        raise _refused(fault) from None
    return dict(zip(names, passed, strict=True))


def service_uid_in(message: f.Object) -> int:
    """The id of the user whose service may connect. Raises ProtocolError."""
    try:
        return f.decode(_Service, (_SERVICE_UID,), message).uid
    except f.Malformed as fault:
        raise _refused(fault) from None


class _Carried(NamedTuple):
    names: tuple[str, ...]


class _Service(NamedTuple):
    uid: int


def _refused(fault: f.Malformed) -> ProtocolError:
    return ProtocolError(
        f"cannot take the policy: {fault}",
        remedy="start the launcher by the program that it belongs to",
    )
