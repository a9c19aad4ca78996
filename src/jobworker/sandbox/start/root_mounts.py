"""Makes the mounts of a job's root: the functions of `sandbox.start.apply` for these steps.

They run in the job's own process, which has a copy of the launcher's mount namespace. If one fails,
nothing has to be undone: the kernel removes the mounts with the process. All raise OSError.

Standard library only. Sources: mount_setattr(2), overlayfs.rst, null(4).
"""

import contextlib
import os
import stat

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.disk.images import ImageSettings
from jobworker.sandbox.start import steps as s

# volatile: the overlay skips all syncs. The disk is discarded with the job, so nothing is lost.
_OVERLAY = "volatile,redirect_dir=on,index=off,metacopy=off"


def map_ids(step: s.MapIds, user_namespace: int) -> None:
    """Replace a mount by a copy of it that shows the ids of the user namespace."""
    # The copy stays at its path, since not every kernel takes a detached mount as a layer.
    tree = sc.open_tree_clone(step.path, recursive=False)
    sc.map_mount(tree, user_namespace)
    sc.move_mount(tree, step.path)
    os.close(tree)


def mount_disk(step: s.MountDisk, image_settings: ImageSettings) -> disk_images.Disk:
    """Make and mount the job's disk. Returns the descriptors by which the launcher holds it."""
    image = disk_images.create(image_settings, step.size_bytes)
    disk_images.mount_image(image, step.path)
    again = disk_images.open_again(image)
    os.close(image)
    root = os.open(step.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return disk_images.Disk(root, again)


def mount_overlay(step: s.MountOverlay) -> None:
    """Mount an overlay of the read-only directories, with a new directory of the disk on top."""
    upper, work = f"{step.disk}/upper", f"{step.disk}/work"
    for path in (step.disk, upper, work):
        os.mkdir(path, 0o755)
    os.chown(upper, step.owner, step.owner)
    os.chmod(upper, stat.S_IMODE(os.stat(step.lower[0]).st_mode))
    options = f"lowerdir={':'.join(step.lower)},upperdir={upper},workdir={work},{_OVERLAY}"
    sc.mount("overlay", step.path, "overlay", sc.MS_NOSUID | sc.MS_NODEV, options)


def mount_devices(step: s.MountDevices) -> None:
    """Mount a small tmpfs, and make device files, links and directories in it."""
    options = f"mode=755,size=64k,nr_inodes=256,uid={step.owner},gid={step.owner}"
    sc.mount("tmpfs", step.path, "tmpfs", sc.MS_NOSUID | sc.MS_NOEXEC, options)
    for name, major, minor in step.devices:
        path = f"{step.path}/{name}"
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        os.chmod(path, 0o666)  # noqa: S103 - every user of the job may use these devices
        os.chown(path, step.owner, step.owner)
    for name, target in step.links:
        os.symlink(target, f"{step.path}/{name}")
    for name in step.directories:
        os.mkdir(f"{step.path}/{name}")


def make_scratch(step: s.MakeScratch) -> None:
    """Make the job's directory in the launcher's scratch directory, and its subdirectories."""
    os.mkdir(step.directory, 0o700)
    for name in step.names:
        path = f"{step.directory}/{name}"
        os.mkdir(path, 0o700)
        os.chown(path, step.owner, step.owner)
        os.chmod(path, 0o1777 if "tmp" in name else 0o755)


def open_volume(step: s.OpenVolume, user_namespace: int) -> tuple[int, bool]:
    """Mount a volume as a detached mount with the job's ids, at the step's descriptor.

    Returns a descriptor of the volume's root directory, and whether the volume is thin.
    """
    os.mkdir(step.mount_point, 0o700)
    try:
        thin = disk_images.mount_volume(step.image, step.mount_point)
    except FileNotFoundError as error:
        if error.filename == step.image:
            error.filename = step.name
        raise
    with contextlib.suppress(OSError):  # an earlier job's start has removed it
        os.rmdir(f"{step.mount_point}/lost+found")
    tree = sc.open_tree_clone(step.mount_point, recursive=False)
    sc.map_mount(tree, user_namespace)
    sc.umount(step.mount_point)
    os.rmdir(step.mount_point)
    os.dup2(tree, step.descriptor, inheritable=False)
    root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
    os.close(tree)
    return root, thin


def place_volume(step: s.PlaceVolume) -> None:
    """Attach an opened volume at its path in the job's root, and make missing directories.

    A runtime or a volume may contain links that lead elsewhere, so this follows no link.
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
