"""Disks in files: an ext4 file system of a fixed size, attached through a loop device.

What a job writes is bounded by the size of its file system, bytes and inodes alike, on any host
with loop devices and ext4: no quota has to be switched on, and what fills up is the job's own.
The image is a file without a name, and the kernel frees it, device and all, once the last mount
of it is gone, whoever was killed before. A job that was given a descriptor of a file on it keeps
it mounted; `discard` takes its blocks away all the same. A sparse image takes what is written to
it; one that is reserved takes its size when it is made, and no write to it can find the disk below
full.

Where that disk is full, a job's write(2), close(2) and sync(2) succeed all the same: the kernel
writes later, and forgets what it could not write. syncfs(2) tells of it, see `lost_writes`.

An image is made in a millisecond: of an empty file system all but some blocks are zeros, so those
few (`Blank`) are kept from one that mke2fs(8) formatted, and written to each new file. There is no
journal, since nothing of it outlives a crash of the host.

The loop device does direct I/O. Nothing is cached twice, and the kernel charges what the device
does to the control group of whoever caused it, so that I/O limits on the disk below hold.

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
from jobworker.sandbox.disk.loop import BLOCK, attach, find_attached, take_blocks
from jobworker.storage import MIN_DISK_BYTES

_MKE2FS = "mke2fs"
_NOT_EXECUTED = 127
"""How a child ends that could not execute mke2fs: the exit code that shells have for this."""
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
"""The label of a volume's file system marks it: it is to stay reserved, whatever was punched out of
its image. A label stands in the image itself, so every copy has it, and no job can change it."""
_RESERVED_MODE = stat.S_ISVTX
"""What marked images in earlier versions: a mode, which `cp -r` and `rsync` without -p lose."""
_SUPERBLOCK, _SUPERBLOCK_BYTES = 1024, 1024
_MAGIC_AT, _MAGIC = 0x38, b"\x53\xef"
_LABEL_AT, _LABEL_BYTES = 0x78, 16
_FS_IOC_SETFSLABEL = 0x41009432
_LABEL_ARGUMENT = struct.Struct("256s")
_OPTIONS = "noinit_itable,nobarrier,noauto_da_alloc,errors=continue"


class Blank(NamedTuple):
    """An empty file system: its size, and its blocks that are not zero, by their offset."""

    size: int
    blocks: tuple[tuple[int, bytes], ...]


class Workshop(NamedTuple):
    """Where images are made, and by what."""

    directory: str
    blanks: Mapping[int, Blank]
    """Those that stand ready, by size; others are formatted when they are asked for."""
    root: str
    """Where mke2fs runs: "" is the root of this process."""
    programs: tuple[tuple[str, str], ...]
    """Directories to be shown there, by their place."""
    keep_free: int = 0
    """Bytes that are to stay free on the disk below."""
    reserve: bool = False
    """Whether images take all of their size at once."""
    label: str = ""
    """What file systems are called: lsblk(8) shows it."""


class Disk(NamedTuple):
    """Descriptors of a job's disk."""

    root: int
    """Of its root, which stays mounted while this is open."""
    image: int
    """Of the file that it is in: see `open_again`."""


class Terms(NamedTuple):
    """How jobs' disks are made."""

    size: int
    """Of those of jobs that ask for no other."""
    keep_free: int
    reserve: bool


def label_of(directory: str) -> str:
    """What the disks of jobs are called whose service has this directory for them."""
    return f"jobs-{binascii.crc32(os.fsencode(directory)):08x}"


def rounded(size: int) -> int:
    """The size of a file system of about `size` bytes: whole blocks, at least `MIN_DISK_BYTES`."""
    return max(size, MIN_DISK_BYTES) // BLOCK * BLOCK


def make_blank(workshop: Workshop, size: int) -> Blank:
    """Format an empty file system and keep its blocks. Raises OSError."""
    image = create(workshop._replace(reserve=False), size)
    try:
        blocks: list[tuple[int, bytes]] = []
        offset = 0
        while True:
            try:
                start = os.lseek(image, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # there is no more data
                    raise
                return Blank(size, tuple(blocks))
            offset = os.lseek(image, start, os.SEEK_HOLE)
            for at in range(start // BLOCK * BLOCK, offset, BLOCK):
                block = os.pread(image, BLOCK, at)
                if any(block):
                    blocks.append((at, block))
    finally:
        os.close(image)


def create(workshop: Workshop, size: int, *, journal: bool = False) -> int:
    """A new image without a name, of `size` bytes, formatted: its descriptor.

    `journal` is for one that is to outlive the host's crashes.

    Raises OSError: ENOSPC where the disk below could not hold it.
    """
    image = os.open(workshop.directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        disk = os.fstatvfs(image)
        free = max(0, disk.f_bavail * disk.f_frsize - workshop.keep_free)
        if free < size:
            where = f"the service's state directory has {free >> 20} MiB for it"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
        os.ftruncate(image, size)
        blank = None if journal else workshop.blanks.get(size)
        if blank is None:
            _format(image, size, workshop, journal=journal)
        else:
            for offset, block in blank.blocks:
                os.pwrite(image, block, offset)
        if workshop.reserve:
            sc.fallocate(image, size)
    except BaseException:
        os.close(image)
        raise
    return image


def mark_reserved(image: int) -> None:
    """Have a volume's image stay reserved, also by a launcher of an earlier version."""
    os.fchmod(image, 0o600 | _RESERVED_MODE)


def is_reserved(image: int) -> bool:
    """Whether a volume's image is marked so. Raises OSError."""
    return _is_labelled(image) or bool(os.fstat(image).st_mode & _RESERVED_MODE)


def _is_labelled(image: int) -> bool:
    block = os.pread(image, _SUPERBLOCK_BYTES, _SUPERBLOCK)
    label = block[_LABEL_AT : _LABEL_AT + _LABEL_BYTES].rstrip(b"\0")
    is_ext4 = block[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC
    return is_ext4 and label == RESERVED_LABEL.encode()


def _label_reserved(target: str) -> None:
    """Label a mounted volume of an earlier version, so that the mark outlives its mode."""
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Not before Linux 5.17 (ENOTTY); the mode marks it on.
        with contextlib.suppress(OSError):
            fcntl.ioctl(root, _FS_IOC_SETFSLABEL, _LABEL_ARGUMENT.pack(RESERVED_LABEL.encode()))
    finally:
        os.close(root)


def _format(image: int, size: int, workshop: Workshop, *, journal: bool) -> None:
    features = f"{_FEATURES},has_journal" if journal else _FEATURES
    pid, pidfd = sc.clone3(0)
    if pid == 0:
        _become_mke2fs(image, size, workshop, features)
    try:
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    finally:
        os.close(pidfd)
    if info is None or (info.si_code, info.si_status) != (os.CLD_EXITED, 0):
        if info is not None and info.si_status == _NOT_EXECUTED:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), "mke2fs (e2fsprogs)")
        raise OSError(errno.EIO, "it failed", "mke2fs")


def _become_mke2fs(image: int, size: int, workshop: Workshop, features: str) -> NoReturn:
    try:
        if workshop.root:
            sc.unshare(sc.CLONE_NEWNS)
            for source, at in (*workshop.programs, ("/proc", "/proc")):
                sc.mount(source, workshop.root + at, None, sc.MS_BIND)
            os.chroot(workshop.root)
        os.chdir("/")
        program = shutil.which(_MKE2FS, path=_PATH)
        for stream in (1, 2):  # which may be a job's by now
            os.dup2(0, stream)
        os.set_inheritable(image, True)
        options = ["-q", "-F", "-t", "ext4", "-O", features, "-b", str(BLOCK), "-I", "256"]
        options += ["-i", str(_BYTES_PER_INODE), "-m", "0"]
        options += ["-E", "lazy_itable_init=1,nodiscard", "-L", workshop.label]
        name = f"/proc/self/fd/{image}"
        if program is not None:
            arguments = [_MKE2FS, *options, name, f"{size >> 10}k"]
            os.execve(program, arguments, {"PATH": _PATH})  # noqa: S606
    finally:
        os._exit(_NOT_EXECUTED)


def mount_volume(path: str, target: str) -> bool:
    """Mount the volume whose image is at `path`, which others may have mounted too.

    Returns whether it is thin. Waits for those who do the same with this image at the same time:
    they are to find one device.
    """
    image = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    # Of its own: the device keeps the other one open, and with it would keep the lock.
    lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = os.fstat(image)
        options, thin = _VOLUME_OPTIONS, not is_reserved(image)
        if thin:
            options += ",discard"
        else:
            # The kernel zeroes blocks by punching them out of the image; they are taken again.
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
    """Mount an image at `target`, by a loop device of its own; it goes with the mount.

    As long as it is there, a lock on `image` tells so: the device keeps the file open.
    """
    fcntl.flock(image, fcntl.LOCK_EX)
    device, path = attach(image)
    try:
        sc.mount(path, target, "ext4", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOATIME, _OPTIONS)
    finally:
        os.close(device)


def lost_writes(root: int) -> bool:
    """Whether a job's disk has lost writes, by a descriptor of the overlay on it.

    It waits for nothing: the overlay is volatile, so syncfs(2) writes nothing, and answers whether
    the kernel has failed to write to the disk since the overlay was mounted.
    """
    try:
        sc.syncfs(root)
    except OSError:
        return True
    return False


def may_still_take(root: int) -> int:
    """How many bytes a disk may still take from the one below, by a descriptor of its root.

    Waits for nothing: statfs(2) reads counters.
    """
    disk = os.fstatvfs(root)
    return disk.f_bfree * disk.f_frsize


def volume_lost_writes(root: int) -> bool:
    """Write out a volume, by a descriptor that was opened at the job's start: whether it lost any.

    May take long. A journal that could not be written leaves the volume read-only.
    """
    return lost_writes(root) or bool(os.fstatvfs(root).f_flag & os.ST_RDONLY)


def open_again(image: int) -> int:
    """Open an image's file once more, for `discard`: a descriptor that has no part in its lock."""
    return os.open(f"/proc/self/fd/{image}", os.O_RDWR | os.O_CLOEXEC)


def discard(disk: Disk) -> None:
    """Let go of a file system that nothing is to be kept of, and free what it takes below.

    Unmounting would write out first what is still in memory; shutting it down makes that
    unnecessary. May take long. Raises OSError.
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
    """Whether a disk is still mounted, by a descriptor of `open_again`. Waits for nothing.

    It is taken for mounted where nothing tells: flock(2) may find no memory for a lock.
    """
    try:
        fcntl.flock(image, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
