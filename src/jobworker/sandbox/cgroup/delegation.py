"""Chooses the group on cgroup2 in which our directory is made, and enables controllers for it.

The choice, in this order:

1. `parent`, if it is given.
2. Our own group, if systemd has delegated it (Delegate=yes, which its extended attributes show) and
   no other process is in it.
3. The group above our own, if that one is delegated (DelegateSubgroup=).
4. The top of the mount, as Docker's cgroupfs driver does. This needs root.

A group that enables controllers for its children must not have processes itself, except for the
real root ("no internal process constraint", Documentation/admin-guide/cgroup-v2.rst). So if only
this process is in the group, it moves into a leaf of the group, and returns in restore().

What must hold: processes of others are never moved; if the group is delegated, nothing above it is
written, since systemd is the only writer there.
"""

import contextlib
import errno
import os
from collections.abc import Sequence

from jobworker import errors
from jobworker.sandbox.cgroup import files, mounts

LEAF = "launcher"


class Base:
    """The group in which our directory is made."""

    def __init__(self, path: str, on_the_way: Sequence[str]) -> None:
        self.path = path
        self._on_the_way = tuple(on_the_way)  # paths of the groups to enable controllers in
        self._home: int | None = None  # a descriptor of `path`, once we stepped aside
        self._enabled_before: set[str] = set()

    @classmethod
    def choose(cls, found: mounts.Hierarchies, parent: str) -> "Base":
        """Choose the group, and move into a leaf of it if need be. Raises `HostUnsupported`."""
        mount = found.unified()
        if mount is None:
            raise errors.HostUnsupported("cannot use cgroup v2: it is not mounted")
        own = found.own_path(mount)
        if parent.strip("/"):
            base = cls._at(mount.point, parent.strip("/"))
        elif own != mount.point and _is_delegated(own) and _members(own) == {os.getpid()}:
            base = cls(own, (own,))
        elif own != mount.point and _is_delegated(up := os.path.dirname(own)):
            base = cls(up, (up,))
        else:
            base = cls._at(mount.point, "")
        base._step_aside()
        return base

    @classmethod
    def _at(cls, point: str, below: str) -> "Base":
        way = [point]
        for name in below.split("/") if below else ():
            way.append(f"{way[-1]}/{name}")
        return cls(way[-1], way)

    def enable(self, controllers: Sequence[str]) -> None:
        """Enable controllers for the children of each group on the way to ours, and of ours.

        Raises `HostUnsupported`.
        """
        for path in self._on_the_way:
            enable(path, controllers)

    def restore(self) -> None:
        """Move back out of the leaf, if the process is in one and the kernel allows it. Idempotent.

        Disables the controllers that were enabled here, and removes the leaf.
        """
        if self._home is None:
            return
        home, self._home = self._home, None
        # If others use the group meanwhile, the controllers stay enabled and this process stays.
        with contextlib.suppress(OSError):
            for controller in set(_enabled(home)) - self._enabled_before:
                files.write(home, "cgroup.subtree_control", f"-{controller}")
            files.write(home, "cgroup.procs", "0")
            os.rmdir(LEAF, dir_fd=home)
        os.close(home)

    def _step_aside(self) -> None:
        members = set() if _is_real_root(self.path) else _members(self.path)
        if others := members - {os.getpid()}:
            raise errors.HostUnsupported(
                f"cannot use the control group {self.path}: it holds {len(others)} other processes",
                remedy="start the launcher as a systemd unit of its own with Delegate=yes, or name "
                "a parent group without processes",
            )
        if not members:
            return
        try:
            self._home = os.open(self.path, files.DIRECTORY)
            with contextlib.suppress(FileExistsError):
                os.mkdir(LEAF, 0o755, dir_fd=self._home)
            self._enabled_before = set(_enabled(self._home))
            files.write(self._home, f"{LEAF}/cgroup.procs", "0")
        except OSError as error:
            self.restore()
            raise errors.HostUnsupported(
                f"cannot move into {self.path}/{LEAF}: {error.strerror}",
                remedy=mounts.remedy_for(error),
            ) from error


def step_into_leaf(found: mounts.Hierarchies) -> None:
    """Move this process into a leaf of its delegated group, if it is alone in the group.

    systemd does the same by DelegateSubgroup= (from version 254 on). To be called before this
    process forks: then all its children are in the leaf too, and our directory can be made beside
    the leaf. Does nothing if the group is not delegated or has other processes.
    """
    mount = found.unified()
    if mount is None:
        return
    own = found.own_path(mount)
    if own == mount.point or not _is_delegated(own) or _members(own) != {os.getpid()}:
        return
    with contextlib.suppress(OSError):
        home = os.open(own, files.DIRECTORY)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(LEAF, 0o755, dir_fd=home)
            files.write(home, f"{LEAF}/cgroup.procs", "0")
        finally:
            os.close(home)


def enable(path: str, controllers: Sequence[str]) -> None:
    """Enable controllers for a group's children.

    Raises `HostUnsupported` with the controller, the kernel's reason and the remedy.
    """
    try:
        group = os.open(path, files.DIRECTORY)
    except OSError as error:
        raise errors.HostUnsupported(
            f"cannot use the control group {path}: {error.strerror}",
            remedy=mounts.remedy_for(error),
        ) from error
    try:
        enabled = _enabled(group)
        for controller in controllers:
            if controller not in enabled:
                _enable_one(group, path, controller)
    finally:
        os.close(group)


def _enabled(group: int) -> list[str]:
    return files.read(group, "cgroup.subtree_control").split()


def _enable_one(group: int, path: str, controller: str) -> None:
    try:
        files.write(group, "cgroup.subtree_control", f"+{controller}")
    except OSError as error:
        reason = f"cannot enable it in {path}: {error.strerror}"
        remedy = mounts.remedy_for(error)
        if error.errno == errno.ENOENT:
            reason = f"the groups above do not give it to {path}"
            remedy = "set Delegate=yes in the systemd unit"
        elif error.errno == errno.EBUSY:
            reason = f"{path} holds processes of its own"
            remedy = "name a parent group without processes"
        raise mounts.unsupported(controller, reason, remedy) from error


def _is_delegated(path: str) -> bool:
    """Whether systemd has delegated this group (systemd.resource-control(5), Delegate=)."""
    for attribute in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(path, attribute) == b"1":
                return True
    return False


def _is_real_root(path: str) -> bool:
    """Whether this is the root of the hierarchy, which has no cgroup.type.

    The root of a cgroup namespace has that file.
    """
    return not os.path.exists(f"{path}/cgroup.type")


def _members(path: str) -> set[int]:
    """The pids of the processes in a group; 0 is for all that our PID namespace cannot see."""
    try:
        with open(f"{path}/cgroup.procs", encoding="ascii") as procs:
            return {int(line) for line in procs}
    except FileNotFoundError:
        return set()
