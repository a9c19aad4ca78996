"""The control groups of jobs: one interface over cgroup v2, v1 and hybrid hosts.

    tree = open_tree(("cpu", "memory", "io", "pids"), "jobworker-1a2b3c4d")
    tree.sweep(); sweep_elsewhere(tree)
    scope = tree.create("spare-1")
    ...                                   # the child is cloned into scope.clone_fd, attaches itself
    scope.arm(ScopeLimits(cpu_percent=50, memory_bytes=64 << 20))
    scope.usage(); scope.kill(); scope.remove()
    tree.close()

v2 is used if one cgroup2 mount offers all controllers that are asked for. Otherwise v1 is used; if
the host also has a cgroup2 mount, that serves to track processes (`kind` "hybrid").

What must hold: only open_tree() and sweep_elsewhere() need paths (/proc, /sys, the cgroup mounts).
All later calls use descriptors and work in any mount namespace. Nothing is changed in a group that
is not ours, except that controllers are enabled above our directory on v2.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

from jobworker import errors
from jobworker.sandbox.cgroup import cpuset as cgroup_cpuset
from jobworker.sandbox.cgroup import delegation, mounts
from jobworker.sandbox.cgroup.accounting import ScopeLimits, ScopeUsage
from jobworker.sandbox.cgroup.files import DIRECTORY
from jobworker.sandbox.cgroup.none import NoTree
from jobworker.sandbox.cgroup.scope import JobScope
from jobworker.sandbox.cgroup.tree import Tree
from jobworker.sandbox.cgroup.v1 import open_v1
from jobworker.sandbox.cgroup.v2 import open_v2

__all__ = [
    "JobScope",
    "ScopeLimits",
    "ScopeUsage",
    "Tree",
    "most_processes",
    "open_tree",
    "step_into_leaf",
    "sweep_elsewhere",
]

_OURS = frozenset({*mounts.V1_NAMES.values(), "cpuacct", cgroup_cpuset.CONTROLLER})
"""The v1 controllers in whose hierarchies a tree may have had a directory."""

HOSTS_PART = 8
"""One part in 8 of all possible processes is left to the host."""
NUMBERS_EACH = 3
"""A process can keep three pids in use: its own, and those of its session and of its process group,
whose leaders may have ended."""


def open_tree(controllers: Sequence[str], name: str, parent: str = "", most: int = 0) -> Tree:
    """Find the hierarchies and make this instance's own directory in each.

    `controllers`: some of "cpu", "memory", "io", "pids"; if there are none, the tree may be one
    without groups. `name`: the directory, such as "jobworker-1a2b3c4d"; an existing one is taken
    over, see `Tree.sweep`. `parent`: the group for that directory, as a path from the top of the
    mount; "" for automatic. `most`: the result of an earlier `most_processes()`; 0 to call it here.

    Raises `HostUnsupported` with the missing controller (`data["controller"]`), the reason and the
    remedy; nothing is left behind then.
    """
    if unknown := set(controllers) - set(mounts.CONTROLLERS):
        raise ValueError(f"no such controllers: {sorted(unknown)}")
    if not name or "/" in name or name.startswith(".") or ".." in parent.split("/"):
        raise ValueError(f"not a name for a control group: {name!r}, {parent!r}")
    try:
        tree = _open_tree(controllers, name, parent)
    except errors.HostUnsupported as error:
        if controllers:
            raise
        return NoTree(name, error.message)
    try:
        tree.bound_processes(most or most_processes())
    except errors.JobworkerError:
        with contextlib.suppress(OSError):
            tree.close()
        raise
    return tree


def _open_tree(controllers: Sequence[str], name: str, parent: str) -> Tree:
    found = _hierarchies()
    offered = _offered(found)
    has_swap = len(_proc("swaps", missing_is_empty=True).splitlines()) > 1
    if found.unified() is not None and set(controllers) <= set(offered):
        return open_v2(found, controllers, name, parent, has_swap)
    absent = mounts.first_missing(controllers, found, offered)
    if absent is not None:
        raise mounts.missing(absent, found, offered)
    return open_v1(found, controllers, name, parent, has_swap)


def sweep_elsewhere(tree: Tree, parent: str = "") -> None:
    """Remove what an earlier instance of this name left in hierarchies that the tree does not use.

    Its configuration may have had more controllers. Only the paths at which this instance would
    make its directory are checked: elsewhere a group of this name may be another container's.
    Raises OSError.
    """
    left = dict[str, int]()
    used = [os.fstat(top) for top in tree.tops]
    try:
        for path in _places(_hierarchies(), tree.name, parent):
            with contextlib.suppress(FileNotFoundError):
                left[path] = os.open(path, DIRECTORY)
                status = os.fstat(left[path])
                if any(os.path.samestat(status, other) for other in used):
                    os.close(left.pop(path))
                used.append(status)
        remains = NoTree(tree.name, "it is another tree's", left)
        remains.sweep()
        remains.close()
        left.clear()
    finally:
        for top in left.values():
            os.close(top)


def _places(found: mounts.Hierarchies, name: str, parent: str) -> Iterator[str]:
    """The paths at which our directory may be; on cgroup2 also at the top: `cgroup.delegation`."""
    for mount in found.mounts:
        if mount.version == 2:
            yield f"{mounts.base_path(found, mount, '', parent)}/{name}"
            yield f"{mount.point}/{name}"
        elif ours := sorted(mount.controllers & _OURS):
            yield f"{mounts.base_path(found, mount, ours[0], parent)}/{name}"


def step_into_leaf() -> None:
    """Move this process into a leaf of its group: see `cgroup.delegation.step_into_leaf`."""
    delegation.step_into_leaf(_hierarchies())


def most_processes() -> int:
    """The most processes and threads that all scopes may have together.

    Without this bound some jobs, each within its own limit, could leave no process for other
    starts, the service and the host. It is what the host can have, by pid_max and threads-max in
    /proc/sys/kernel (proc(5)), less one part in `HOSTS_PART`. To be called before a new PID
    namespace is entered: from Linux 6.14 on, each has a pid_max of its own, 4,194,304 at first.
    """
    numbers, threads = (int(_proc(f"sys/kernel/{name}")) for name in ("pid_max", "threads-max"))
    most = min(numbers // NUMBERS_EACH, threads)
    return most - most // HOSTS_PART


def _hierarchies() -> mounts.Hierarchies:
    return mounts.parse(
        _proc("self/mountinfo"), _proc("self/cgroup"), _proc("cgroups", missing_is_empty=True)
    )


def _offered(found: mounts.Hierarchies) -> list[str]:
    """The controllers that the cgroup2 mount offers; the configuration uses the same names."""
    mount = found.unified()
    if mount is None:
        return []
    try:
        with open(f"{mount.point}/cgroup.controllers", encoding="ascii") as listed:
            return listed.read().split()
    except OSError:
        return []


def _proc(name: str, *, missing_is_empty: bool = False) -> str:
    try:
        with open(f"/proc/{name}", encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError as error:
        if missing_is_empty and isinstance(error, FileNotFoundError):
            return ""
        raise errors.HostUnsupported(
            f"cannot read /proc/{name}: {error.strerror}", remedy="mount proc on /proc"
        ) from error
