"""The launcher's own mount namespace, which jobs are cloned from: few mounts, nothing of the host.

`sandbox.root.host_view` or `sandbox.root.plain_root` put in it what jobs' roots are made of, and
say so in a `Stage`. Few mounts are copied for each job then, and the host's file systems are out of
reach even for a job that stays in the launcher's namespace.

Standard library only.
"""

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jobworker.errors import SandboxError
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disk.images import Workshop
from jobworker.sandbox.start.plan import Order, View

SCRATCH, VOLUMES = "/scratch", "/volumes"
"""Where the service's directories are for what jobs write and keep."""
READ_ONLY = sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV

EMPTY = (
    *("home", "mnt", "media", "srv", "opt", "boot"),
    *("var/cache", "var/lib", "var/local", "var/log", "var/mail", "var/opt", "var/spool"),
)
"""Directories of every root."""
WITH_MODES = {"tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700, "workspace": 0o755}
LINKS = {"var/run": "/run", "var/lock": "/run/lock", "etc/mtab": "/proc/self/mounts"}


class Stage(NamedTuple):
    """What stands in the namespace: how a job's root is put together, and its disk made."""

    view: View
    workshop: Workshop | None
    gaps: tuple[str, ...]
    """What this costs in isolation, in words."""
    runtimes: Mapping[str, View]
    """Views of other root trees, by name."""
    volumes: Workshop | None
    """Where volumes stand; None where there can be none."""

    def view_for(self, order: Order | None) -> View:
        """The view that an order asks for. Raises SandboxError where there is none."""
        if order is None:
            return self.view
        if self.workshop is None and (order.disk_bytes or order.volumes):
            raise SandboxError(
                "cannot bound what the job writes to disk without root's rights",
                remedy="ask for no disk limit and no volume, or run the service as root",
                data={"step": "mount-disk"},
            )
        if not order.runtime:
            return self.view
        if order.runtime not in self.runtimes:
            raise SandboxError(
                f"there is no runtime {order.runtime!r}", data={"step": "mount-overlay"}
            )
        return self.runtimes[order.runtime]

    def left_over(self) -> list[str]:
        """What an earlier launcher left where jobs' directories are made."""
        place = self.view.scratch
        return [f"{place}/{name}" for name in os.listdir(place)] if place else []


def clone(path: str, attributes: int) -> int:
    """A detached copy of the one mount at `path` with these attributes."""
    tree = sc.open_tree_clone(path, recursive=False)
    sc.mount_setattr(tree, attributes)
    return tree


def own_namespace() -> None:
    """Leave the host's mount namespace; what is cloned from now on stays in ours."""
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)


def move_to(stage: str, mounts: Mapping[str, int], directories: Iterable[str]) -> None:
    """Make an empty tmpfs at `stage` the root, with detached mounts and empty directories in it."""
    sc.mount("tmpfs", stage, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV, "mode=700,size=1m")
    os.umask(0o22)
    for path in ("/proc", *directories, *mounts):
        os.mkdir(stage + path, 0o755)
    sc.mount("proc", f"{stage}/proc", "proc", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
    for path, tree in mounts.items():
        sc.move_mount(tree, stage + path)
        os.close(tree)
    os.chdir(stage)
    sc.pivot_root(".", ".")
    sc.umount(".")
    os.chdir("/")


def make_mount_points(root: str) -> None:
    """Make in an empty directory what is mounted upon, and what every job may write to."""
    for name in ("dev", "proc", "sys", "run"):
        os.mkdir(f"{root}/{name}", 0o755)
    for name, mode in WITH_MODES.items():
        os.makedirs(f"{root}/{name}", 0o755)
        os.chmod(f"{root}/{name}", mode)


def make_skeleton(root: str, links: Mapping[str, str]) -> None:
    """Fill an empty directory with what every root has."""
    make_mount_points(root)
    for name in EMPTY:
        os.makedirs(f"{root}/{name}", 0o755)
    for name, target in {**links, **LINKS}.items():
        os.makedirs(os.path.dirname(f"{root}/{name}"), 0o755, exist_ok=True)
        os.symlink(target, f"{root}/{name}")
