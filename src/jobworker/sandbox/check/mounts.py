"""Probes of the mounts that a job's root is made of.

Each probe runs in a mount namespace of its own, on a tmpfs that the kernel removes with it.

Standard library only.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from jobworker.model.units import MEBIBYTE
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.check.probing import Missing, Probe, reason_of, run_in_child
from jobworker.sandbox.user_namespaces import Ids, make_user_namespace

_STAGES = ("/tmp", "/var/tmp", "/run", "/mnt")  # noqa: S108 - mounted over, never written to
_NEW_API = "use Linux 5.12 or newer"


def probes(programs: Sequence[str], ids: Ids, *, has_rights: bool) -> Iterable[Probe]:
    """The probes of this module; `programs` are the host's directories that jobs see.

    `has_rights` is whether root runs the service. Then jobs can change their root, which needs
    overlays on ID-mapped mounts.
    """
    shown = next((path for path in programs if os.path.isdir(path)), "/")
    mapped = partial(_mapped, shown, ids)
    idmap = "keep what jobs see on ext4, xfs, btrfs or tmpfs, with Linux 5.12 or newer"
    overlay = "load it: modprobe overlay; for lowers with mapped owners use Linux 5.19 or newer"
    proc = "run outside of a container, or in one whose /proc is not masked"
    for name, work, remedy, needed in (
        ("tmpfs with a bound", _tmpfs, "allow mount(2): see the mount namespace", True),
        ("open_tree, mount_setattr", partial(_new_api, shown), _NEW_API, True),
        ("fresh proc", _proc, proc, True),
        ("terminals (devpts)", _devpts, "use a kernel with CONFIG_UNIX98_PTYS", True),
        ("device nodes", _devices, "run outside of a container", True),
        ("pivot_root", _pivot, "run outside of a chroot", True),
        ("overlay", partial(_overlay, shown), overlay, has_rights),
        ("mapped owners (ID-mapped mount)", mapped, idmap, has_rights),
        ("overlay on mapped owners", partial(mapped, on=_overlay_upon), overlay, has_rights),
    ):
        yield Probe("mounts", name, partial(on_stage, work), remedy, needed)


def on_stage(work: Callable[[str], str]) -> str:
    """Call `work` in a new mount namespace, with the path of a new tmpfs to mount in."""
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
    stage = next((path for path in _STAGES if os.path.isdir(path)), "")
    if not stage:
        raise Missing(f"none of {', '.join(_STAGES)} is a directory to mount on")
    sc.mount("tmpfs", stage, "tmpfs", sc.MS_NOSUID, "mode=755,size=4m")
    return work(stage)


def _tmpfs(stage: str) -> str:
    small = _directory(stage, "small")
    sc.mount("tmpfs", small, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV, "size=1m")
    try:
        with open(f"{small}/big", "wb", buffering=0) as file:
            while file.tell() <= 2 * MEBIBYTE:
                file.write(b"\1" * MEBIBYTE)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return "tmpfs, size="
        raise
    raise Missing("it takes more than its size")


def _new_api(shown: str, stage: str) -> str:
    place = _directory(stage, "tree")
    tree = sc.open_tree_clone(shown, recursive=False)
    sc.mount_setattr(tree, sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV)
    sc.move_mount(tree, place)
    if not os.statvfs(place).f_flag & os.ST_RDONLY:
        raise Missing("a mount that was made read-only is writable")
    return "open_tree, mount_setattr, move_mount"


def _proc(stage: str) -> str:
    place = _directory(stage, "proc")

    def mounted() -> str:
        sc.mount("proc", place, "proc", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
        seen = [name for name in os.listdir(place) if name.isdigit()]
        if seen != ["1"]:
            raise Missing(f"it shows {len(seen)} processes instead of its own")
        return "proc"

    return run_in_child(mounted, sc.CLONE_NEWPID | sc.CLONE_NEWNS)


def _devpts(stage: str) -> str:
    place = _directory(stage, "pts")
    sc.mount("devpts", place, "devpts", sc.MS_NOSUID | sc.MS_NOEXEC, "newinstance,ptmxmode=0666")
    os.open(f"{place}/ptmx", os.O_RDWR | os.O_NOCTTY)  # left open: the terminal exists as long
    if not os.path.exists(f"{place}/0"):
        raise Missing("a terminal that was opened does not appear")
    return "devpts, newinstance"


def _devices(stage: str) -> str:
    node = f"{stage}/null"
    try:
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.close(os.open(node, os.O_WRONLY))
    except PermissionError:  # mknod(2) is refused in a user namespace: bind-mount the host's
        os.close(os.open(f"{stage}/borrowed", os.O_WRONLY | os.O_CREAT))
        sc.mount("/dev/null", f"{stage}/borrowed", None, sc.MS_BIND)
        os.close(os.open(f"{stage}/borrowed", os.O_WRONLY))
        return "bind mounts of the host's"
    return "mknod"


def _pivot(stage: str) -> str:
    os.chdir(stage)
    sc.pivot_root(".", ".")
    sc.umount(".")
    os.chdir("/")
    if os.listdir("/"):
        raise Missing("the old root is still visible")
    return "pivot_root"


def _overlay(shown: str, stage: str) -> str:
    return _overlay_upon(shown, stage)


def _overlay_upon(lower: str, stage: str) -> str:
    upper, work, merged = (_directory(stage, name) for name in ("upper", "work", "merged"))
    options = f"lowerdir={lower},upperdir={upper},workdir={work},volatile"
    sc.mount("overlay", merged, "overlay", sc.MS_NOSUID | sc.MS_NODEV, options)
    os.mkdir(f"{merged}/new")
    if not os.path.isdir(f"{upper}/new") or not set(os.listdir(lower)) < set(os.listdir(merged)):
        raise Missing("it does not show new files and those of the lower directory together")
    return "overlay, volatile"


def _mapped(shown: str, ids: Ids, stage: str, on: Callable[[str, str], str] | None = None) -> str:
    place = _directory(stage, "mapped")
    tree = sc.open_tree_clone(shown, recursive=False)
    namespace = make_user_namespace(ids.first, ids.each)
    try:
        sc.map_mount(tree, namespace)
    except OSError as error:
        kind = f"the file system of {shown} cannot do it, or the mount is ID-mapped already"
        why = f"{reason_of(error)}: {kind}" if error.errno == errno.EINVAL else reason_of(error)
        raise Missing(why) from error
    sc.move_mount(tree, place)
    owner = os.stat(place).st_uid
    if owner != ids.first:
        raise Missing(f"root's files belong to uid {owner} there, instead of {ids.first}")
    return on(place, stage) if on else "mount_setattr, idmap"


def _directory(stage: str, name: str) -> str:
    path = f"{stage}/{name}"
    os.mkdir(path, 0o755)
    return path
