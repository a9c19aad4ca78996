"""Makes, mounts and discards disks in files: ext4 file systems of a fixed size on loop devices.

The size of its file system bounds what a job writes, in bytes and in inodes. This works on any host
with loop devices and ext4: no quota has to be switched on, and a job can fill only its own disk.

The image is a file without a name. The kernel frees the file and its loop device once the last
mount of it is gone, even if the launcher was killed. Another job that holds a descriptor of a file
on the disk keeps it mounted; `discard` frees its blocks all the same. A sparse image allocates
blocks as they are written. A reserved image allocates its whole size when it is made, so no write
to it fails because the disk below is full.

Where the disk below is full, a job's write(2), close(2) and sync(2) on a sparse image succeed all
the same: the kernel writes back later, and drops what it could not write. Only syncfs(2) reports
this, see `lost_writes`.

Making an image takes a millisecond. Most blocks of an empty file system are zeros, so the other few
(`ImageTemplate`) are copied from a file system that mke2fs(8) formatted once, and written to each
new file. A job's disk has no journal, since it does not outlive a crash of the host.

The loop device uses direct I/O. So nothing is cached twice, and the kernel charges the I/O of the
device to the control group that caused it, which makes I/O limits on the disk below hold.

Standard library only. Sources: loop(4), ext4(5), mke2fs(8), Documentation/filesystems/ext4.
"""

import binascii
import contextlib
import errno
import fcntl
import os
import shutil
import stat
import struct
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disk.loop_devices import BLOCK, attach, find_attached, take_blocks
from jobworker.storage import MIN_DISK_BYTES

_MKE2FS = "mke2fs"
_NOT_EXECUTED = 127
"""The exit code of a child that could not execute mke2fs, as shells have it."""
_FEATURES = (
    "none,64bit,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,"
    "large_file,metadata_csum,sparse_super"
)
_BYTES_PER_INODE = 8192
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"

_EXT4_IOC_SHUTDOWN = 0x8004587D
_WITHOUT_FLUSHING = struct.pack("=I", 2)
_VOLUME_OPTIONS = "errors=remount-ro"
RESERVED_LABEL = "jobs-reserved"
"""The file system label that marks a volume as reserved. `mount_volume` then allocates again the
blocks that were punched out of the image. The label is part of the image, so every copy of the file
has it, and no job can change it."""
_RESERVED_MODE = stat.S_ISVTX
"""The mark of earlier versions: a mode bit, which `cp -r` and `rsync` without -p lose."""
_SUPERBLOCK, _SUPERBLOCK_BYTES = 1024, 1024
_MAGIC_AT, _MAGIC = 0x38, b"\x53\xef"
_LABEL_AT, _LABEL_BYTES = 0x78, 16
_FS_IOC_SETFSLABEL = 0x41009432
_LABEL_ARGUMENT = struct.Struct("256s")
_OPTIONS = "noinit_itable,nobarrier,noauto_da_alloc,errors=continue"


class ImageTemplate(NamedTuple):
    """An empty file system: its size in bytes, and its blocks that are not zero, with offsets."""

    size: int
    blocks: tuple[tuple[int, bytes], ...]


class ImageSettings(NamedTuple):
    """The directory in which images are made, and the settings for making them."""

    directory: str
    templates: Mapping[int, ImageTemplate]
    """Prepared file systems, by size in bytes. mke2fs formats an image of any other size."""
    root: str
    """The root directory in which mke2fs runs; "" is the root of this process."""
    programs: tuple[tuple[str, str], ...]
    """Directories to bind-mount below `root` for mke2fs: (source, path below `root`)."""
    keep_free: int = 0
    """Bytes that must stay free on the disk below."""
    reserve: bool = False
    """Whether an image allocates its whole size when it is made."""
    label: str = ""
    """The label of the file systems: lsblk(8) shows it."""


class Disk(NamedTuple):
    """The two descriptors by which the launcher holds a job's disk."""

    root: int
    """The root directory of the file system, which stays mounted while this is open."""
    image: int
    """The image file, opened by `open_again`."""


class DiskSettings(NamedTuple):
    """The settings for jobs' disks."""

    size: int
    """Bytes of a disk whose job asks for no other size."""
    keep_free: int
    """Bytes that must stay free on the disk below."""
    reserve: bool
    """Whether a disk allocates its whole size when it is made."""


def label_of(directory: str) -> str:
    """The label of the jobs' disks of the service that keeps them in `directory`."""
    return f"jobs-{binascii.crc32(os.fsencode(directory)):08x}"


def rounded(size: int) -> int:
    """`size` rounded down to whole blocks, in bytes; at least `MIN_DISK_BYTES`."""
    return max(size, MIN_DISK_BYTES) // BLOCK * BLOCK


def make_template(image_settings: ImageSettings, size: int) -> ImageTemplate:
    """An empty file system of `size` bytes, formatted by mke2fs(8). Raises OSError."""
    image = create(image_settings._replace(reserve=False), size)
    try:
        blocks: list[tuple[int, bytes]] = []
        offset = 0
        while True:
            try:
                start = os.lseek(image, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # there is no more data
                    raise
                return ImageTemplate(size, tuple(blocks))
            offset = os.lseek(image, start, os.SEEK_HOLE)
            for at in range(start // BLOCK * BLOCK, offset, BLOCK):
                block = os.pread(image, BLOCK, at)
                if any(block):
                    blocks.append((at, block))
    finally:
        os.close(image)


def create(image_settings: ImageSettings, size: int, *, journal: bool = False) -> int:
    """A descriptor of a new formatted image of `size` bytes, a file without a name.

    `journal` adds a journal, for a file system that is to survive a crash of the host. Raises
    OSError, ENOSPC if the disk below has no room for the image above `keep_free`.
    """
    image = os.open(image_settings.directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        disk = os.fstatvfs(image)
        free = max(0, disk.f_bavail * disk.f_frsize - image_settings.keep_free)
        if free < size:
            where = f"the service's state directory has {free >> 20} MiB for it"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
        os.ftruncate(image, size)
        blank = None if journal else image_settings.templates.get(size)
        if blank is None:
            _format(image, size, image_settings, journal=journal)
        else:
            for offset, block in blank.blocks:
                os.pwrite(image, block, offset)
        if image_settings.reserve:
            sc.fallocate(image, size)
    except BaseException:
        os.close(image)
        raise
    return image


def mark_reserved(image: int) -> None:
    """Mark a volume's image as reserved for launchers of earlier versions, which read its mode."""
    os.fchmod(image, 0o600 | _RESERVED_MODE)


def is_reserved(image: int) -> bool:
    """Whether a volume's image is marked as reserved, by label or mode. Raises OSError."""
    return _is_labelled(image) or bool(os.fstat(image).st_mode & _RESERVED_MODE)


def _is_labelled(image: int) -> bool:
    block = os.pread(image, _SUPERBLOCK_BYTES, _SUPERBLOCK)
    label = block[_LABEL_AT : _LABEL_AT + _LABEL_BYTES].rstrip(b"\0")
    is_ext4 = block[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC
    return is_ext4 and label == RESERVED_LABEL.encode()


def _label_reserved(target: str) -> None:
    """Label a mounted volume that an earlier version marked by its mode only."""
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Linux before 5.17 answers ENOTTY; then the mode stays the only mark.
        with contextlib.suppress(OSError):
            fcntl.ioctl(root, _FS_IOC_SETFSLABEL, _LABEL_ARGUMENT.pack(RESERVED_LABEL.encode()))
    finally:
        os.close(root)


def _format(image: int, size: int, image_settings: ImageSettings, *, journal: bool) -> None:
    features = f"{_FEATURES},has_journal" if journal else _FEATURES
    pid, pidfd = sc.clone3(0)
    if pid == 0:
        _become_mke2fs(image, size, image_settings, features)
    try:
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    finally:
        os.close(pidfd)
    if info is None or (info.si_code, info.si_status) != (os.CLD_EXITED, 0):
        if info is not None and info.si_status == _NOT_EXECUTED:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), "mke2fs (e2fsprogs)")
        raise OSError(errno.EIO, "it failed", "mke2fs")


def _become_mke2fs(image: int, size: int, image_settings: ImageSettings, features: str) -> NoReturn:
    try:
        if image_settings.root:
            sc.unshare(sc.CLONE_NEWNS)
            for source, at in (*image_settings.programs, ("/proc", "/proc")):
                sc.mount(source, image_settings.root + at, None, sc.MS_BIND)
            os.chroot(image_settings.root)
        os.chdir("/")
        program = shutil.which(_MKE2FS, path=_PATH)
        for stream in (1, 2):  # in a child these may be the job's own output
            os.dup2(0, stream)
        os.set_inheritable(image, True)
        options = ["-q", "-F", "-t", "ext4", "-O", features, "-b", str(BLOCK), "-I", "256"]
        options += ["-i", str(_BYTES_PER_INODE), "-m", "0"]
        options += ["-E", "lazy_itable_init=1,nodiscard", "-L", image_settings.label]
        name = f"/proc/self/fd/{image}"
        if program is not None:
            arguments = [_MKE2FS, *options, name, f"{size >> 10}k"]
            os.execve(program, arguments, {"PATH": _PATH})  # noqa: S606
    finally:
        os._exit(_NOT_EXECUTED)


def mount_volume(path: str, target: str) -> bool:
    """Mount the volume whose image is at `path` on `target`, and return whether it is thin.

    Other jobs may have mounted it already. A lock on the image makes concurrent callers take turns,
    so that all of them use one loop device: two devices in front of one file would corrupt it.
    Raises OSError.
    """
    image = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    # The lock has a descriptor of its own: the loop device keeps `image` open, and a lock on that
    # open file description would last as long.
    lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = os.fstat(image)
        options, thin = _VOLUME_OPTIONS, not is_reserved(image)
        if thin:
            options += ",discard"
        else:
            # The kernel zeroes blocks of the device by punching holes into the image: fill them.
            sc.fallocate(image, status.st_size)
        device, name = find_attached(image) or attach(image)
        try:
            sc.mount(name, target, "ext4", sc.MS_NOSUID | sc.MS_NODEV, options)
        finally:
            os.close(device)
        if not thin and not _is_labelled(image):
            _label_reserved(target)
        return thin
    finally:
        os.close(lock)
        os.close(image)


def mount_image(image: int, target: str) -> None:
    """Mount an image at `target` by a new loop device, which the kernel frees with the mount.

    Locks `image`. The device keeps that open file description, so the lock lasts as long as the
    device, and `is_attached` can test it. Raises OSError.
    """
    fcntl.flock(image, fcntl.LOCK_EX)
    device, path = attach(image)
    try:
        sc.mount(path, target, "ext4", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOATIME, _OPTIONS)
    finally:
        os.close(device)


def lost_writes(root: int) -> bool:
    """Whether a job's disk has lost writes; `root` is a descriptor of the overlay on the disk.

    Never waits for I/O: the overlay is volatile (overlayfs.rst), so syncfs(2) writes nothing. It
    fails if the kernel could not write to the disk since the overlay was mounted.
    """
    try:
        sc.syncfs(root)
    except OSError:
        return True
    return False


def may_still_take(root: int) -> int:
    """How many bytes a job can still write to the disk with the root directory `root`.

    A sparse image may still allocate that much on the disk below. Never waits for I/O: statfs(2)
    reads counters.
    """
    disk = os.fstatvfs(root)
    return disk.f_bfree * disk.f_frsize


def volume_lost_writes(root: int) -> bool:
    """Write out a volume, and return whether writes were lost since `root` was opened.

    `root` is a descriptor that was opened at the job's start. May take long. A volume that has
    become read-only counts as well: the kernel makes it so when it cannot write the journal.
    """
    return lost_writes(root) or bool(os.fstatvfs(root).f_flag & os.ST_RDONLY)


def open_again(image: int) -> int:
    """A second descriptor of an image's file, for `discard`. It does not share the first's lock."""
    return os.open(f"/proc/self/fd/{image}", os.O_RDWR | os.O_CLOEXEC)


def discard(disk: Disk) -> None:
    """Discard a job's disk: close its descriptors and free its blocks on the disk below.

    Unmounting alone would first write out what is still in memory. Shutting the file system down
    (EXT4_IOC_SHUTDOWN) avoids that. May take long. Raises OSError.
    """
    try:
        try:
            fcntl.ioctl(disk.root, _EXT4_IOC_SHUTDOWN, _WITHOUT_FLUSHING)
        finally:
            os.close(disk.root)
        if is_attached(disk.image):
            take_blocks(disk.image)
    finally:
        os.close(disk.image)


def is_attached(image: int) -> bool:
    """Whether a disk is still mounted; `image` is a descriptor of `open_again`. Never waits.

    True as well if flock(2) fails for another reason, such as a lack of memory for a lock.
    """
    try:
        fcntl.flock(image, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
