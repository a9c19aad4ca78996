"""The control groups of jobs: one interface over cgroup v2, v1 and hybrid hosts.

    tree = open_tree(("cpu", "memory", "io", "pids"), "jobworker-1a2b3c4d")
    tree.sweep()
    scope = tree.create("spare-1")
    ...                                   # the child is cloned into scope.clone_fd, attaches itself
    scope.arm(Limits(cpu_percent=50, memory_bytes=64 << 20))
    scope.usage(); scope.kill(); scope.remove()
    tree.close()

v2 is used where one cgroup2 mount offers all the controllers that are asked for; else v1, with
the cgroup2 mount beside it, if there is one, for tracking processes (`kind` "hybrid").

What must hold: open_tree() is the only function here that needs paths (/proc, /sys, the cgroup
mounts); everything after it works through descriptors, in any mount namespace. Nothing
is changed in a group that is not ours, but for enabling controllers above our directory on v2.
"""

from collections.abc import Sequence

from jobworker import errors
from jobworker.sandbox import cgroup_delegation as delegation
from jobworker.sandbox import cgroup_mounts as mounts
from jobworker.sandbox.cgroup_none import NoTree
from jobworker.sandbox.cgroup_scope import Limits, Scope, Tree, Usage
from jobworker.sandbox.cgroup_v1 import open_v1
from jobworker.sandbox.cgroup_v2 import open_v2

__all__ = ["Limits", "Scope", "Tree", "Usage", "open_tree", "step_into_leaf"]


def open_tree(controllers: Sequence[str], name: str, parent: str = "") -> Tree:
    """Find the hierarchies and make this instance's own directory in each.

    `controllers`: some of "cpu", "memory", "io", "pids". `name`: the directory, such as
    "jobworker-1a2b3c4d"; one that exists is taken over, see `Tree.sweep`. `parent`: the group that
    it shall stand in, as a path from the top of the mount; "" for automatic.
    Raises `HostUnsupported` with the missing controller (`data["controller"]`), the reason and the
    remedy; nothing is left behind then. Who asks for no controller at all gets a tree in any case.
    """
    if unknown := set(controllers) - set(mounts.CONTROLLERS):
        raise ValueError(f"no such controllers: {sorted(unknown)}")
    if not name or "/" in name or name.startswith(".") or ".." in parent.split("/"):
        raise ValueError(f"not a name for a control group: {name!r}, {parent!r}")
    try:
        return _open_tree(controllers, name, parent)
    except errors.HostUnsupported as error:
        if controllers:
            raise
        return NoTree(name, error.message)


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


def step_into_leaf() -> None:
    """See `cgroup_delegation.step_into_leaf`."""
    delegation.step_into_leaf(_hierarchies())


def _hierarchies() -> mounts.Hierarchies:
    return mounts.parse(
        _proc("self/mountinfo"), _proc("self/cgroup"), _proc("cgroups", missing_is_empty=True)
    )


def _offered(found: mounts.Hierarchies) -> list[str]:
    """The controllers of the cgroup2 mount, those in our configuration's words."""
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
