"""The root that jobs see: an allow-list, assembled once at the launcher's start.

What the host gains tomorrow must not show, so nothing starts from the host's `/`:

    /usr      and /bin, /lib… where they are no links; read-only, no setuid, no devices
    /etc      a snapshot of allow-listed names, only of what every user of the host may read
    /dev      six device nodes; terminals and shared memory are added for each job
    /var      a skeleton
    the rest  empty directories

The launcher then moves into a mount namespace that holds this tree, the scratch directory and
/proc alone: jobs are cloned from it, so few mounts are copied for each and the host's file
systems are out of reach even for a job that stays in the launcher's namespace. From then on the
launcher reaches control groups by the descriptors it opened before.

Standard library only.
"""

import os
import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jobworker.errors import HostUnsupported
from jobworker.sandbox import syscalls as sc

ROOT, SCRATCH = "/root", "/scratch"
"""Where the jobs' tree and their directories on disk stand in the launcher's namespace."""

_DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
}
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
_EMPTY = (
    *("dev/pts", "dev/shm", "proc", "sys", "run", "root", "home", "workspace", "tmp"),
    *("mnt", "media", "srv", "opt", "boot", "var/tmp", "var/lib", "var/cache", "var/log"),
    *("var/spool", "var/local", "var/mail", "var/opt"),
)
_LINKS = {"var/run": "/run", "var/lock": "/run/lock", "etc/mtab": "/proc/self/mounts"}
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")

_READ_ONLY = sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV
_MAX_ETC_FILE_BYTES = 4 << 20
_MAX_ETC_ENTRIES = 20_000


class _Entry(NamedTuple):
    """One name of the /etc snapshot: a directory, a file's content, or a link's target."""

    path: str
    mode: int
    content: bytes | None
    target: str | None


def program_trees(programs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The directories to show read-only, and the links to make: (`programs` and /bin… , links).

    On a host with a merged /usr (the usual case) /bin is a link and stays one.
    """
    trees = [path for path in programs if os.path.isdir(path)]
    links = {}
    for name in _MERGED:
        path = f"/{name}"
        if os.path.islink(path):
            links[name] = os.readlink(path)
        elif os.path.isdir(path) and path not in trees:
            trees.append(path)
    if not trees:
        raise HostUnsupported(
            f"cannot show jobs any programs: none of {', '.join(programs)} is a directory",
            remedy="correct sandbox.programs in the configuration",
        )
    return trees, links


def snapshot_etc(names: Iterable[str], base: str = "/etc") -> list[_Entry]:
    """Read the allow-listed `names` below /etc, as far as every user of the host may.

    A link stays a link where it ends inside /usr or inside what is allowed; where it leads
    elsewhere (resolv.conf to /run, say) the file at its end is copied.
    """
    allowed = [os.path.normpath(os.path.join(base, name)) for name in names]
    entries: list[_Entry] = []
    waiting = [path for path in allowed if path.startswith(base + "/") and _is_reachable(path)]
    while waiting and len(entries) < _MAX_ETC_ENTRIES:
        path = waiting.pop()
        entry, below = _read_entry(path, allowed)
        if entry is not None:
            entries.append(entry)
            waiting.extend(below)
    return entries


def _read_entry(path: str, allowed: Sequence[str]) -> tuple[_Entry | None, list[str]]:
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            end = os.path.realpath(path)
            if any(end == a or end.startswith(a + "/") for a in ("/usr", *allowed)):
                return _Entry(path, 0, None, os.readlink(path)), []
            path_to_read = end
            status = os.lstat(end)
        else:
            path_to_read = path
        if not status.st_mode & stat.S_IROTH or not (path_to_read == path or _is_reachable(end)):
            return None, []
        if stat.S_ISDIR(status.st_mode) and path_to_read == path:
            if not status.st_mode & stat.S_IXOTH:
                return None, []
            below = [f"{path}/{name}" for name in sorted(os.listdir(path))]
            return _Entry(path, 0o755, None, None), below
        if stat.S_ISREG(status.st_mode) and status.st_size <= _MAX_ETC_FILE_BYTES:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            with open(os.open(path_to_read, flags), "rb") as file:
                return _Entry(path, status.st_mode & 0o555 | 0o444, file.read(), None), []
    except OSError:
        pass  # gone or unreadable since: what cannot be read is not shown
    return None, []


def _is_reachable(path: str) -> bool:
    """Whether every user of the host may pass through the directories above `path`."""
    while path != "/":
        path = os.path.dirname(path)
        try:
            if not os.stat(path).st_mode & stat.S_IXOTH:
                return False
        except OSError:
            return False
    return True


def enter(stage: str, scratch: str, programs: Sequence[str], etc: Sequence[str]) -> None:
    """Move this process into a mount namespace of its own that holds the jobs' tree.

    `stage` is an empty directory to mount upon, `scratch` the directory for the jobs' files.
    Raises HostUnsupported with the kernel's reason.
    """
    try:
        trees, links = program_trees(programs)
        entries = snapshot_etc(etc)
        sc.unshare(sc.CLONE_NEWNS)
        sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
        clones = {path: _clone(path, _READ_ONLY) for path in trees}
        devices = {name: sc.open_tree_clone(f"/dev/{name}") for name in _DEVICES}
        disk = _clone(scratch, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV)
        sc.mount("tmpfs", stage, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV, "mode=700,size=1m")
        os.umask(0o22)
        for path in (ROOT, SCRATCH, "/proc"):
            os.mkdir(stage + path, 0o755)
        sc.mount("proc", f"{stage}/proc", "proc", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
        _attach(disk, stage + SCRATCH)
        _assemble(stage + ROOT, clones, devices, links, entries)
        os.chdir(stage)
        sc.pivot_root(".", ".")
        sc.umount(".")
        os.chdir("/")
    except OSError as error:
        raise HostUnsupported(
            f"cannot assemble the root for jobs: {error.strerror or error}",
            remedy="run the service as root on the host itself, with Linux 5.12 or newer",
        ) from error


def _clone(path: str, attributes: int) -> int:
    tree = sc.open_tree_clone(path)
    sc.mount_setattr(tree, attributes)
    return tree


def _attach(tree: int, target: str) -> None:
    sc.move_mount(tree, target)
    os.close(tree)


def _assemble(
    root: str,
    clones: dict[str, int],
    devices: dict[str, int],
    links: dict[str, str],
    entries: Sequence[_Entry],
) -> None:
    sc.mount("tmpfs", root, "tmpfs", sc.MS_NOSUID, "mode=755,size=64m")
    for name in _EMPTY:
        os.makedirs(f"{root}/{name}", 0o755, exist_ok=True)
    for name, target in {**links, **_LINKS}.items():
        os.makedirs(os.path.dirname(f"{root}/{name}"), 0o755, exist_ok=True)
        os.symlink(target, f"{root}/{name}")
    for path, tree in clones.items():
        os.makedirs(root + path, 0o755, exist_ok=True)
        _attach(tree, root + path)
    for entry in entries:
        _write_entry(root + entry.path, entry)
    for name, tree in devices.items():
        _make_device(f"{root}/dev/{name}", *_DEVICES[name], tree)
    for name, target in _DEVICE_LINKS.items():
        os.symlink(target, f"{root}/dev/{name}")
    sc.mount(None, root, None, sc.MS_REMOUNT | sc.MS_RDONLY | sc.MS_NOSUID)


def _make_device(path: str, major: int, minor: int, borrowed: int) -> None:
    """Make a device node; where nobody may (in a user namespace) the host's own is borrowed."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(major, minor))
        os.chmod(path, 0o666)  # noqa: S103 - devices that are for all
    except PermissionError:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        _attach(borrowed, path)
    else:
        os.close(borrowed)


def _write_entry(path: str, entry: _Entry) -> None:
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    if entry.target is not None:
        if not os.path.lexists(path):
            os.symlink(entry.target, path)
    elif entry.content is None:
        os.makedirs(path, entry.mode, exist_ok=True)
    else:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags, entry.mode), "wb") as file:
            file.write(entry.content)
