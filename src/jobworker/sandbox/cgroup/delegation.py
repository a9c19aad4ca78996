"""Where on cgroup2 our directory may stand, and the controllers on the way to it.

In order: below `parent`, if given; below our own group, where systemd has delegated it
(Delegate=yes, seen in its extended attributes) and no other process is in it; below the delegated
group that our own is a leaf of (DelegateSubgroup=); else at the top of the mount, as Docker's
cgroupfs driver does, which needs root.

A group that gives controllers to its children must not hold processes itself, the real root
excepted ("no internal process constraint", Documentation/admin-guide/cgroup-v2.rst). So in a
group that holds only us, we step aside into a leaf, and go back in restore().

What must hold: other people's processes are never moved; in a delegated group nothing above it is
written (systemd is the only writer there).
"""

import contextlib
import errno
import os
from collections.abc import Sequence

from jobworker import errors
from jobworker.sandbox.cgroup import files, mounts

LEAF = "launcher"


class Base:
    """The group that our directory stands in."""

    def __init__(self, path: str, on_the_way: Sequence[str]) -> None:
        self.path = path
        self._on_the_way = tuple(on_the_way)  # paths of the groups to enable controllers in
        self._home: int | None = None  # a descriptor of `path`, once we stepped aside
        self._enabled_before: set[str] = set()

    @classmethod
    def choose(cls, found: mounts.Hierarchies, parent: str) -> "Base":
        """Choose the group and step aside if need be; raises `HostUnsupported`."""
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
        """Enable controllers for the children of each group on the way."""
        for path in self._on_the_way:
            enable(path, controllers)

    def restore(self) -> None:
        """Undo the step aside, if there was one, as far as the kernel lets us; idempotent."""
        if self._home is None:
            return
        home, self._home = self._home, None
        # Where the group is used by others meanwhile, controllers stay on and so do we.
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
    """Leave the delegated group that holds this process alone, for a leaf of it.

    What systemd does itself with DelegateSubgroup= (from version 254 on). To be called before this
    process forks: all of it then is in the leaf, and our directory can stand beside that. Nothing
    happens where the group is not delegated or holds others.
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
    """Whether systemd has handed this group over (systemd.resource-control(5), Delegate=)."""
    for attribute in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(path, attribute) == b"1":
                return True
    return False


def _is_real_root(path: str) -> bool:
    """The root of the hierarchy lacks this file; the root of a cgroup namespace has it."""
    return not os.path.exists(f"{path}/cgroup.type")


def _members(path: str) -> set[int]:
    """The processes of a group; 0 stands for those that our PID namespace cannot see."""
    try:
        with open(f"{path}/cgroup.procs", encoding="ascii") as procs:
            return {int(line) for line in procs}
    except FileNotFoundError:
        return set()
