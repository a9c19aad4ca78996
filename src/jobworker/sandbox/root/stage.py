"""The stage: the launcher's own mount namespace, with few mounts and none of the host's.

`sandbox.root.host_view` or `sandbox.root.plain_root` mounts there what jobs' roots are made of, and
describes it in a `Stage`. The kernel copies the mounts of this namespace for each job, so their
small number makes a start fast. And a job that failed to leave the namespace would still not reach
the host's file systems.

Standard library only.
"""

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jobworker.errors import SandboxError
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disk.images import ImageSettings
from jobworker.sandbox.start.plan import Order, RootView

SCRATCH, VOLUMES = "/scratch", "/volumes"
"""The mount points of the service's directories for jobs' disks and for volumes."""
READ_ONLY = sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV

EMPTY = (
    *("home", "mnt", "media", "srv", "opt", "boot"),
    *("var/cache", "var/lib", "var/local", "var/log", "var/mail", "var/opt", "var/spool"),
)
"""The empty directories of every root."""
WITH_MODES = {"tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700, "workspace": 0o755}
LINKS = {"var/run": "/run", "var/lock": "/run/lock", "etc/mtab": "/proc/self/mounts"}


class Stage(NamedTuple):
    """The content of the namespace: views to make a job's root of, and settings for its disk."""

    view: RootView
    """The view of the host's programs."""
    image_settings: ImageSettings | None
    """The settings for jobs' disks; None where the launcher cannot make any."""
    gaps: tuple[str, ...]
    """What isolates jobs less than with root's rights, as sentences for the log."""
    runtimes: Mapping[str, RootView]
    """The views of runtimes, by name."""
    volumes: ImageSettings | None
    """The settings for volumes; None where the launcher cannot make any."""

    def view_for(self, order: Order | None) -> RootView:
        """The view that an order asks for.

        Raises SandboxError for an unknown runtime, and for a bounded disk or a volume where the
        launcher cannot make any.
        """
        if order is None:
            return self.view
        if self.image_settings is None and (order.disk_bytes or order.volumes):
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
        """The paths of jobs' directories that an earlier launcher left behind."""
        place = self.view.scratch
        return [f"{place}/{name}" for name in os.listdir(place)] if place else []


def clone(path: str, attributes: int) -> int:
    """A detached copy of the mount at `path` with these attributes, without mounts below it."""
    tree = sc.open_tree_clone(path, recursive=False)
    sc.mount_setattr(tree, attributes)
    return tree


def unshare_mounts() -> None:
    """Move this process into a new mount namespace that shares no mount events with the host."""
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)


def move_to(stage: str, mounts: Mapping[str, int], directories: Iterable[str]) -> None:
    """Make a new tmpfs, mounted at `stage`, this process's root directory.

    The tmpfs gets `mounts`, detached mounts by their path, and the empty `directories`.
    """
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
    """Make the sandbox's mount points and the directories that every job may write to in `root`."""
    for name in ("dev", "proc", "sys", "run"):
        os.mkdir(f"{root}/{name}", 0o755)
    for name, mode in WITH_MODES.items():
        os.makedirs(f"{root}/{name}", 0o755)
        os.chmod(f"{root}/{name}", mode)


def make_skeleton(root: str, links: Mapping[str, str]) -> None:
    """Fill the empty directory `root` with the directories and links that every root has."""
    make_mount_points(root)
    for name in EMPTY:
        os.makedirs(f"{root}/{name}", 0o755)
    for name, target in {**links, **LINKS}.items():
        os.makedirs(os.path.dirname(f"{root}/{name}"), 0o755, exist_ok=True)
        os.symlink(target, f"{root}/{name}")
