"""The launcher's policy: what it was told by whoever started it, before the first request.

Standard library only.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jobworker.sandbox.channel import Message
from jobworker.sandbox.seccomp import program as bpf


class Policy(NamedTuple):
    """What the launcher was told by whoever started it, once and for all."""

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
    """So much stays free where disks are made."""
    overcommit: bool
    """Whether jobs' disks take what is written to them, and not their size at once."""
    runtimes: Mapping[str, str]
    """Root trees that jobs may ask for, by name."""


def policy_from(message: Message) -> Policy:
    """The policy in the first message; its sender started the launcher and is trusted."""

    def texts(key: str) -> tuple[str, ...]:
        value = message[key]
        assert isinstance(value, list)
        return tuple(str(item) for item in value)

    def number(key: str) -> int:
        value = message[key]
        assert isinstance(value, int)
        return value

    filters = message["filters"]
    assert isinstance(filters, dict)
    runtimes = message["runtimes"]
    assert isinstance(runtimes, dict)
    return Policy(
        instance=str(message["instance"]),
        stage=str(message["stage"]),
        scratch=str(message["scratch"]),
        volumes=str(message["volumes"]),
        controllers=texts("controllers"),
        cgroup_parent=str(message["cgroup_parent"]),
        programs=texts("programs"),
        etc=texts("etc"),
        first_uid=number("first_uid"),
        max_jobs=number("max_jobs"),
        spares=number("spares"),
        tmpfs_bytes=number("tmpfs_bytes"),
        filters=bpf.filters_from(filters),
        disk_bytes=number("disk_bytes"),
        keep_free_bytes=number("keep_free_bytes"),
        overcommit=message["overcommit"] is True,
        runtimes={str(name): str(path) for name, path in runtimes.items()},
    )


def policy_message(policy: Policy) -> Message:
    """What `policy_from` reads."""
    message: Message = dict(policy._asdict())
    for key, value in message.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            message[key] = list(value)
    message["filters"] = bpf.filters_message(policy.filters)
    return message
