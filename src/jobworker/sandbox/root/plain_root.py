"""Assembles the root of jobs for a launcher without root's rights: read-only, and one for all jobs.

An ordinary user can have no disks in files, no whiteouts and no ID-mapped mounts. So jobs see the
host's programs as they are, with no more rights over them than the user has. A job can write only
to directories of its own. The kernel does not bound their size, and the gap `GAP` says so.

Standard library only.
"""

import os
import stat
from collections.abc import Mapping, Sequence

from jobworker.errors import HostUnsupported
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.root.etc_snapshot import EtcEntry, snapshot_etc, write_entry
from jobworker.sandbox.root.host_trees import program_trees
from jobworker.sandbox.root.stage import (
    READ_ONLY,
    SCRATCH,
    Stage,
    clone,
    make_skeleton,
    move_to,
    unshare_mounts,
)
from jobworker.sandbox.start.plan import DEVICE_LINKS, DEVICES, RootView
from jobworker.sandbox.start.steps import ROOT

GAP = "without root's rights the space that a job takes on disk has no bound"


def enter(stage: str, scratch: str, programs: Sequence[str], etc: Sequence[str]) -> Stage:
    """Move this process into a mount namespace of its own with the jobs' root, and describe it.

    `stage` is an empty directory to mount on, `scratch` the directory for the jobs' files. Raises
    HostUnsupported with the kernel's reason.
    """
    try:
        trees, links = program_trees(programs)
        entries = snapshot_etc(etc)
        unshare_mounts()
        shown = {path: _clone_all(path) for path in trees}
        devices = {name: sc.open_tree_clone(f"/dev/{name}") for name, _, _ in DEVICES}
        mounts = {SCRATCH: clone(scratch, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV)}
        move_to(stage, mounts, (ROOT,))
        _assemble(shown, devices, links, entries)
    except OSError as error:
        raise HostUnsupported(
            f"cannot assemble the root for jobs: {error.strerror or error}",
            remedy="see `worker check`; Linux 5.12 or newer is needed",
        ) from error
    return Stage(RootView(f"{ROOT}/dev/null", scratch=SCRATCH), None, (GAP,), {}, None)


def _clone_all(path: str) -> int:
    tree = sc.open_tree_clone(path)
    sc.mount_setattr(tree, READ_ONLY)
    return tree


def _assemble(
    shown: Mapping[str, int],
    devices: Mapping[str, int],
    links: Mapping[str, str],
    entries: Sequence[EtcEntry],
) -> None:
    sc.mount("tmpfs", ROOT, "tmpfs", sc.MS_NOSUID, "mode=755,size=64m")
    make_skeleton(ROOT, links)
    for path, tree in shown.items():
        os.makedirs(ROOT + path, 0o755, exist_ok=True)
        _attach(tree, ROOT + path)
    for entry in entries:
        write_entry(ROOT + entry.path, entry)
    for name in ("pts", "shm"):
        os.mkdir(f"{ROOT}/dev/{name}")
    for name, tree in devices.items():
        # Bind-mount the host's device: mknod(2) of a device is refused in a user namespace.
        path = f"{ROOT}/dev/{name}"
        os.mknod(path, stat.S_IFREG | 0o600)
        _attach(tree, path)
    for name, target in DEVICE_LINKS:
        os.symlink(target, f"{ROOT}/dev/{name}")
    sc.mount(None, ROOT, None, sc.MS_REMOUNT | sc.MS_RDONLY | sc.MS_NOSUID)


def _attach(tree: int, target: str) -> None:
    sc.move_mount(tree, target)
    os.close(tree)
