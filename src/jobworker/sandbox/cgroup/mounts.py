"""Finds this host's control-group hierarchies, from the text of three files in /proc.

A host has one of three layouts. v2: one hierarchy (file system cgroup2) with all controllers. v1: a
hierarchy for each controller, or for a few together ("cpu,cpuacct"). Hybrid: v1 hierarchies with
the controllers, and a cgroup2 mount without any. A controller belongs to one hierarchy at a time,
so a controller that is mounted on v1 is missing on v2.

The path of a process's group needs two facts: its path in /proc/self/cgroup, from the root of the
hierarchy or of the cgroup namespace, and the root field of the mount, since in a container the
mount may show only a part of the hierarchy.

The functions are pure, except for `make_directory` and `discard` at the end. Sources: cgroups(7),
cgroup_namespaces(7), proc_pid_mountinfo(5).
"""

import contextlib
import errno
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from jobworker import errors
from jobworker.sandbox.cgroup.files import DIRECTORY

V1_NAMES = {"cpu": "cpu", "memory": "memory", "io": "blkio", "pids": "pids"}
CONTROLLERS = tuple(V1_NAMES)
_BUILT_BY = {
    "cpu": "CONFIG_CFS_BANDWIDTH",
    "memory": "CONFIG_MEMCG",
    "io": "CONFIG_BLK_CGROUP and CONFIG_BLK_DEV_THROTTLING",
    "pids": "CONFIG_CGROUP_PIDS",
}


class Mount(NamedTuple):
    """A mounted hierarchy. `root` is the part of it that the mount shows."""

    root: str
    point: str
    version: int  # 1 or 2
    controllers: frozenset[str]  # v1 names; empty for v2


class Hierarchies(NamedTuple):
    """All mounted hierarchies, and the group of this process in each ("" is the key of v2)."""

    mounts: tuple[Mount, ...]
    membership: dict[str, str]
    enabled: dict[str, bool]  # /proc/cgroups: v1 name, whether it is switched on

    def unified(self) -> Mount | None:
        """The cgroup2 mount, or None."""
        return next((mount for mount in self.mounts if mount.version == 2), None)

    def legacy(self, v1_name: str) -> Mount | None:
        """The v1 mount with this controller, or None."""
        return next((mount for mount in self.mounts if v1_name in mount.controllers), None)

    def own_path(self, mount: Mount, v1_name: str = "") -> str:
        """The path of this process's own group, with the mount point."""
        return mount.point + below_mount(mount.root, self.membership.get(v1_name, "/"))


def parse(mountinfo: str, membership: str, cgroups: str) -> Hierarchies:
    """The hierarchies in the text of /proc/self/mountinfo, /proc/self/cgroup and /proc/cgroups."""
    rows = [line.split() for line in cgroups.splitlines() if not line.startswith("#")]
    return Hierarchies(
        parse_mounts(mountinfo),
        parse_membership(membership),
        {row[0]: row[3] == "1" for row in rows if len(row) == 4},
    )


def parse_mounts(mountinfo: str) -> tuple[Mount, ...]:
    """The control-group mounts of a mountinfo file, in its order."""
    mounts = []
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if not separator or kind[0] not in {"cgroup", "cgroup2"}:
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        options = kind[2].split(",") if version == 1 else []
        known = frozenset(options) - {"rw", "ro", "xattr"}
        mounts.append(Mount(_unescape(fields[3]), _unescape(fields[4]), version, known))
    return tuple(mounts)


def parse_membership(text: str) -> dict[str, str]:
    """The path of this process's group by controller, from lines "ID:CONTROLLERS:PATH".

    The line of v2 has no controllers; its key is "".
    """
    places = {}
    for line in text.splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            places[name] = path
    return places


def below_mount(root: str, path: str) -> str:
    """A group's path below the mount point: "" or "/a/b".

    If the group is outside the part that the mount shows, or outside the cgroup namespace ("/.."),
    it cannot be reached, and the result is "", the top of the mount.
    """
    if ".." in path.split("/"):
        return ""
    inside = path == root or path.startswith(root.rstrip("/") + "/")
    return path[len(root.rstrip("/")) :].rstrip("/") if inside else ""


def first_missing(
    controllers: Sequence[str], found: Hierarchies, v2_controllers: Sequence[str]
) -> str | None:
    """The first controller that v1 does not have, so that v1 cannot be used; None if it has all.

    A controller that v2 does not have either comes first.
    """
    not_on_v1 = [name for name in controllers if found.legacy(V1_NAMES[name]) is None]
    nowhere = [name for name in not_on_v1 if name not in v2_controllers]
    return next(iter(nowhere or not_on_v1), None)


def missing(
    controller: str, found: Hierarchies, v2_controllers: Sequence[str]
) -> errors.HostUnsupported:
    """The error for a controller that no usable hierarchy offers, with reason and remedy."""
    v1_name = V1_NAMES[controller]
    if not found.mounts:
        reason = "no control-group file system is mounted"
        remedy = "mount one: mount -t cgroup2 none /sys/fs/cgroup"
    elif found.enabled.get(v1_name) is False:
        reason = "it is switched off"
        remedy = f"remove cgroup_disable={v1_name} from (or add cgroup_enable={v1_name} to) the "
        remedy += "kernel command line"
    elif controller in v2_controllers:
        reason = "it is on cgroup v2 while other controllers in use are on cgroup v1"
        remedy = "boot with systemd.unified_cgroup_hierarchy=1 so that all are on v2"
    elif found.legacy(v1_name) is not None:
        reason = "it is on cgroup v1 while other controllers in use are only on cgroup v2"
        remedy = "boot with systemd.unified_cgroup_hierarchy=1 so that all are on v2"
    elif v1_name in found.enabled and any(mount.version == 1 for mount in found.mounts):
        reason = "its hierarchy is not mounted"
        remedy = f"mount it: mount -t cgroup -o {v1_name} cgroup /sys/fs/cgroup/{v1_name}"
    else:
        reason = "cgroup.controllers does not list it"
        remedy = f"use a kernel with {_BUILT_BY[controller]}, and inside a container delegate it"
    return unsupported(controller, reason, remedy)


def unsupported(controller: str, reason: str, remedy: str) -> errors.HostUnsupported:
    """The error for a controller that this host does not offer."""
    return errors.HostUnsupported(
        f"cannot use the {controller} controller: {reason}",
        remedy=f"{remedy}, or take {controller} out of cgroup.enable_controllers",
        data={"controller": controller},
    )


def base_path(found: Hierarchies, mount: Mount, v1_name: str, parent: str) -> str:
    """The path of the group for our directory: `parent` in this hierarchy, or our own group."""
    if parent.strip("/"):
        return f"{mount.point}/{parent.strip('/')}"
    return found.own_path(mount, v1_name)


def make_directory(path: str, controller: str = "") -> int:
    """Make a group, if it does not exist yet, and open it.

    `controller`: the controller that the group is for, for the error; "" for several. Raises
    `HostUnsupported`.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755)
        return os.open(path, DIRECTORY)
    except OSError as error:
        message = f"cannot make the group {path}: {error.strerror}"
        if controller:
            raise unsupported(controller, message, remedy_for(error)) from error
        raise errors.HostUnsupported(message, remedy=remedy_for(error)) from error


def remedy_for(error: OSError) -> str:
    """The remedy for a group that cannot be made or written."""
    if error.errno == errno.EROFS:
        return "mount the control groups read-write"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return (
            "run as root, or as a systemd unit with Delegate=yes "
            "(a user: systemd-run --user --scope -p Delegate=yes …)"
        )
    if error.errno == errno.ENOENT:
        return "name a parent group that exists in every hierarchy in use"
    return "see cgroups(7)"


def discard(path: str, top: int) -> None:
    """Close a group that is not needed, and remove it unless it is in use."""
    os.close(top)
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes for blanks, tabs, newlines and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
