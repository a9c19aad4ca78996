"""The mounts that a job's root is made of: what `sandbox.start.apply` does for these steps.

Run in the job's own process, before it has left the launcher's mount namespace. Nothing is
half-made where one fails: what was mounted goes with the process.

Standard library only. Sources: mount_setattr(2), overlayfs.rst, null(4).
"""

import contextlib
import os
import stat

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.disk.images import Workshop
from jobworker.sandbox.start import steps as s

# volatile: what is written need not reach the disk at the end, the disk itself goes then.
_OVERLAY = "volatile,redirect_dir=on,index=off,metacopy=off"


def map_ids(step: s.MapIds, user_namespace: int) -> None:
    """Have a mount show the ids of the user namespace, in its own place."""
    # There overlays find it by path: not every kernel takes a detached mount as a layer.
    tree = sc.open_tree_clone(step.path, recursive=False)
    sc.map_mount(tree, user_namespace)
    sc.move_mount(tree, step.path)
    os.close(tree)


def mount_disk(step: s.MountDisk, workshop: Workshop) -> disk_images.Disk:
    """Mount a new disk."""
    image = disk_images.create(workshop, step.size_bytes)
    disk_images.mount_image(image, step.path)
    again = disk_images.open_again(image)
    os.close(image)
    root = os.open(step.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return disk_images.Disk(root, again)


def mount_overlay(step: s.MountOverlay) -> None:
    """Lay a writable directory of the disk over read-only ones."""
    upper, work = f"{step.disk}/upper", f"{step.disk}/work"
    for path in (step.disk, upper, work):
        os.mkdir(path, 0o755)
    os.chown(upper, step.owner, step.owner)
    os.chmod(upper, stat.S_IMODE(os.stat(step.lower[0]).st_mode))
    options = f"lowerdir={':'.join(step.lower)},upperdir={upper},workdir={work},{_OVERLAY}"
    sc.mount("overlay", step.path, "overlay", sc.MS_NOSUID | sc.MS_NODEV, options)


def mount_devices(step: s.MountDevices) -> None:
    """Make device nodes, links and directories in a small tmpfs."""
    options = f"mode=755,size=64k,nr_inodes=256,uid={step.owner},gid={step.owner}"
    sc.mount("tmpfs", step.path, "tmpfs", sc.MS_NOSUID | sc.MS_NOEXEC, options)
    for name, major, minor in step.devices:
        path = f"{step.path}/{name}"
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        os.chmod(path, 0o666)  # noqa: S103 - devices that are for all
        os.chown(path, step.owner, step.owner)
    for name, target in step.links:
        os.symlink(target, f"{step.path}/{name}")
    for name in step.directories:
        os.mkdir(f"{step.path}/{name}")


def make_scratch(step: s.MakeScratch) -> None:
    """Make directories of the job's own in one that the launcher keeps for them."""
    os.mkdir(step.directory, 0o700)
    for name in step.names:
        path = f"{step.directory}/{name}"
        os.mkdir(path, 0o700)
        os.chown(path, step.owner, step.owner)
        os.chmod(path, 0o1777 if "tmp" in name else 0o755)


def open_volume(step: s.OpenVolume, user_namespace: int) -> tuple[int, bool]:
    """Mount a volume, take hold of it as the job is to see it, and let go of the mount.

    Returns a descriptor of its root, and whether it is thin.
    """
    os.mkdir(step.stage, 0o700)
    try:
        thin = disk_images.mount_volume(step.image, step.stage)
    except FileNotFoundError as error:
        if error.filename == step.image:
            error.filename = step.name
        raise
    with contextlib.suppress(OSError):  # gone since the first time
        os.rmdir(f"{step.stage}/lost+found")
    tree = sc.open_tree_clone(step.stage, recursive=False)
    sc.map_mount(tree, user_namespace)
    sc.umount(step.stage)
    os.rmdir(step.stage)
    os.dup2(tree, step.descriptor, inheritable=False)
    root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
    os.close(tree)
    return root, thin


def place_volume(step: s.PlaceVolume) -> None:
    """Go to a place in the job's root, make what is missing on the way, and mount there.

    The root may be of anybody's making, so no link is followed.
    """
    way = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in step.path.split("/")[1:]:
        try:
            os.mkdir(part, 0o755, dir_fd=here)
            os.chown(part, step.owner, step.owner, dir_fd=here, follow_symlinks=False)
        except FileExistsError:
            pass
        try:
            below = os.open(part, way, dir_fd=here)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), step.path) from None
        os.close(here)
        here = below
    sc.move_mount(step.descriptor, here)
    os.close(here)
    os.close(step.descriptor)
