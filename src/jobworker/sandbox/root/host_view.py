"""Assembles the layers of jobs' roots in the launcher's own mount namespace, at its start.

A job's root starts empty, not from the host's `/`, so that a directory which the host gains later
does not appear in jobs. The root is an overlay (overlayfs.rst) of read-only layers; what the job
changes goes to its own disk:

    /         a skeleton with a snapshot of the allowed part of /etc
    /usr      the host's directory, without setuid bits, device files and files that not every
              user may read. The same holds for the others of `sandbox.programs`, and for /bin,
              /lib… where these are no links.

Each job sees the layers with the ids of its own range (ID-mapped mounts, mount_setattr(2)). So the
owner of the host's files is root inside the job, and the job's root has no rights outside. The
skeleton stands on a disk in a file as well, since not every kernel can map ids on a tmpfs.

Standard library only.
"""

import errno
import os
import stat
from collections.abc import Mapping, Sequence

from jobworker.errors import HostUnsupported
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.disk.images import DiskSettings, ImageSettings, ImageTemplate
from jobworker.sandbox.root.etc_snapshot import EtcEntry, snapshot_etc, write_entry
from jobworker.sandbox.root.host_trees import not_for_all, program_trees, with_mounts_below
from jobworker.sandbox.root.runtimes import check_trees, lay_over, view_of
from jobworker.sandbox.root.stage import (
    READ_ONLY,
    SCRATCH,
    VOLUMES,
    Stage,
    clone,
    make_skeleton,
    move_to,
    unshare_mounts,
)
from jobworker.sandbox.start.plan import DISK, Layer, RootView
from jobworker.sandbox.start.steps import ROOT
from jobworker.sandbox.user_namespaces import make_user_namespace

BASE, LAYERS = "/base", "/layers"
"""The mount points of the skeleton and of the host's directories, in the launcher's namespace."""
OVER = f"{BASE}/over"
"""The directory of the layer that lies above the tree of a runtime."""

_BASE_BYTES = 128 << 20
_TRIAL_UID = 1_000_000
"""The first id that the trial of ID-mapped mounts maps to. The trial writes no file, so any unused
id would do."""


def enter(
    stage: str,
    scratch: str,
    volumes: str,
    programs: Sequence[str],
    etc: Sequence[str],
    disks: DiskSettings,
    runtimes: Mapping[str, str],
) -> Stage:
    """Move this process into a mount namespace of its own with the jobs' layers, and describe it.

    `stage` is an empty directory to mount on. `scratch` is the directory for the images of jobs'
    disks, `volumes` that for the images of volumes. Raises HostUnsupported with the kernel's
    reason, and ConfigError if a runtime is no root tree.
    """
    check_trees(runtimes)
    try:
        trees, links = program_trees(programs)
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            trees = with_mounts_below(trees, mounts.read())
        hidden = {tree: _searched(tree) for tree in trees}
        entries = snapshot_etc(etc)
        blanks = _blanks(scratch, disks.size)
        _move(stage, {SCRATCH: scratch, VOLUMES: volumes}, [*trees, *runtimes.values()])
        image_settings = ImageSettings(SCRATCH, blanks, "", ())
        layers = _lay_base(image_settings, trees, hidden, links, entries)
    except OSError as error:
        raise HostUnsupported(
            f"cannot assemble the root for jobs: {error.strerror or error}"
            + (f" ({error.filename})" if error.filename else ""),
            remedy="run the service as root on the host itself, with Linux 5.19 or newer",
        ) from error
    shown = tuple((layer.lower[-1], layer.at) for layer in layers[1:])
    mapped = [BASE, *(f"{LAYERS}/{number}" for number in range(len(trees) + len(runtimes)))]
    _try_mapping(dict(zip(mapped, ["the skeleton", *trees, *runtimes.values()], strict=True)))
    view = RootView("/dev/null", (BASE, *(source for source, _ in shown)), layers)
    others = {
        name: view_of(BASE, OVER, f"{LAYERS}/{number}")
        for number, name in enumerate(runtimes, start=len(trees))
    }
    for_volumes = ImageSettings(VOLUMES, {}, f"{BASE}/root", shown, disks.keep_free)
    image_settings = for_volumes._replace(
        directory=SCRATCH,
        templates=blanks,
        reserve=disks.reserve,
        label=disk_images.label_of(scratch),
    )
    return Stage(view, image_settings, (), others, for_volumes)


def _searched(tree: str) -> list[str]:
    """The names to hide in a tree. Raises HostUnsupported if it cannot be searched."""
    try:
        return not_for_all(tree)
    except OSError as error:
        raise HostUnsupported(
            f"cannot show jobs {tree}: cannot search it for what not every user may read: "
            f"{error.strerror} ({error.filename or tree})",
            remedy="take it out of sandbox.programs",
        ) from error


def _try_mapping(mounts: Mapping[str, str]) -> None:
    """Raise HostUnsupported for the first mount whose ids cannot be mapped.

    `mounts` has the name of each for the message, by its mount point.
    """
    try:
        namespace = make_user_namespace(_TRIAL_UID)
    except OSError:
        return  # without user namespaces each job is refused, with the step that needs one
    try:
        for mount, name in mounts.items():
            tree = sc.open_tree_clone(mount, recursive=False)
            try:
                sc.map_mount(tree, namespace)
            except OSError as error:
                raise HostUnsupported(
                    f"cannot show jobs {name} with ids of their own: {error.strerror}",
                    remedy="use Linux 5.19 or newer and ext4, xfs or btrfs there, "
                    "or take it out of sandbox.programs or runtimes",
                ) from error
            finally:
                os.close(tree)
    finally:
        os.close(namespace)


def _blanks(scratch: str, disk_bytes: int) -> dict[int, ImageTemplate]:
    """Prepared file systems for the skeleton and for jobs' disks, by size in bytes.

    Raises HostUnsupported if they cannot be made.
    """
    here = ImageSettings(scratch, {}, "", (), label=disk_images.label_of(scratch))
    try:
        return {size: disk_images.make_template(here, size) for size in (_BASE_BYTES, disk_bytes)}
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
        remedy = "install e2fsprogs, and keep worker.state_dir on a local file system with room"
        if error.errno == errno.ENOSPC:
            room = max(_BASE_BYTES, disk_bytes) >> 20
            remedy = f"make room where worker.state_dir is: {room} MB at least"
            if disk_bytes > _BASE_BYTES:
                remedy += ", or lower sandbox.disk_limit"
        if error.errno == errno.EFBIG:
            remedy = "raise the limit on the size of files (LimitFSIZE=, ulimit -f)"
        raise HostUnsupported(f"cannot make disks for jobs: {reason}", remedy=remedy) from error


def _move(stage: str, writable: Mapping[str, str], trees: Sequence[str]) -> None:
    unshare_mounts()
    mounts = {f"{LAYERS}/{n}": clone(path, READ_ONLY) for n, path in enumerate(trees)}
    for at, path in writable.items():
        mounts[at] = clone(path, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV)
    mounts["/dev"] = clone("/dev", sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NOEXEC)
    move_to(stage, mounts, (ROOT, BASE, DISK, LAYERS))


def _lay_base(
    image_settings: ImageSettings,
    trees: Sequence[str],
    hidden: dict[str, list[str]],
    links: dict[str, str],
    entries: Sequence[EtcEntry],
) -> tuple[Layer, ...]:
    """Make the skeleton and the masks on a new disk, and return all layers of a job's root.

    The first layer is the skeleton, mounted at "/". The disk is read-only afterwards.
    """
    image = disk_images.create(image_settings, _BASE_BYTES)
    try:
        disk_images.mount_image(image, BASE)
    finally:
        os.close(image)
    root = f"{BASE}/root"
    os.mkdir(OVER, 0o755)
    lay_over(OVER, entries)
    os.mkdir(root, 0o755)
    make_skeleton(root, links)
    for entry in entries:
        write_entry(root + entry.path, entry)
    layers = [Layer("", (root,))]
    for number, path in enumerate(trees):
        os.makedirs(root + path, 0o755, exist_ok=True)
        layers.append(_layer(BASE, number, path, hidden[path]))
    sc.mount(None, BASE, None, sc.MS_REMOUNT | sc.MS_RDONLY | sc.MS_NOSUID | sc.MS_NODEV)
    return tuple(layers)


def _layer(base: str, number: int, path: str, hidden: Sequence[str]) -> Layer:
    """The layer of the tree that jobs see at `path`, below a mask if it has names to hide."""
    tree = f"{LAYERS}/{number}"
    if not hidden:
        return Layer(path, (tree,))
    try:
        return Layer(path, (_mask(f"{base}/masks-{number}", tree, hidden), tree))
    except OSError as error:
        raise HostUnsupported(
            f"cannot show jobs {path}: cannot hide the {len(hidden)} names in it that not every "
            f"user may read: {error.strerror}",
            remedy="take it out of sandbox.programs",
        ) from error


def _mask(place: str, tree: str, names: Sequence[str]) -> str:
    """Make a layer in `place` that hides `names` of `tree` by whiteouts; returns `place`.

    An overlay shows the owner and mode of a directory's uppermost layer (overlayfs.rst). So the
    directories of this layer get owner and mode of those in `tree`.
    """
    _copy_directory(tree, place)
    for name in names:
        at = ""
        for part in name.split("/")[:-1]:
            at += f"/{part}"
            if not os.path.isdir(place + at):
                _copy_directory(tree + at, place + at)
        os.mknod(f"{place}/{name}", stat.S_IFCHR, os.makedev(0, 0))
    return place


def _copy_directory(like: str, path: str) -> None:
    status = os.stat(like)
    os.mkdir(path)
    os.chown(path, status.st_uid, status.st_gid)
    os.chmod(path, stat.S_IMODE(status.st_mode))
