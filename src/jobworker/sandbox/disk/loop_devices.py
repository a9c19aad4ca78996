"""Attaches image files to loop devices with direct I/O: loop(4).

The kernel detaches a device when its last descriptor and mount is gone (LO_FLAGS_AUTOCLEAR).

Standard library only.
"""

import errno
import fcntl
import os
import struct

BLOCK = 4096

_LOOP_CONFIGURE, _LOOP_SET_STATUS64, _LOOP_GET_STATUS64 = 0x4C0A, 0x4C04, 0x4C05
_LOOP_SET_CAPACITY, _LOOP_CTL_GET_FREE = 0x4C07, 0x4C82
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR, _LO_FLAGS_DIRECT_IO = 1, 4, 16
# struct loop_info64: device, inode, rdevice, offset, sizelimit, number, encrypt_type,
# encrypt_key_size, flags, file name, crypt name, encrypt key, init
_LOOP_INFO = struct.Struct("=5Q4I64s64s32s2Q")
_ATTEMPTS = 64


def attach(image: int, *, read_only: bool = False) -> tuple[int, str]:
    """Attach an image to a free loop device, and return a descriptor and the path of the device.

    The kernel detaches it when its last descriptor and mount is gone. Raises OSError: ENOTSUP if
    the file system that holds the image has no direct I/O, EBUSY if other processes took every
    device first.
    """
    flags = _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO | (_LO_FLAGS_READ_ONLY if read_only else 0)
    info = _LOOP_INFO.pack(*[0] * 8, flags, b"", b"", b"", 0, 0)
    request = struct.pack("=2I", image, BLOCK) + info + bytes(64)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            path = f"/dev/loop{number}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, request)
                _check_direct(device)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # another process took this device first
                    raise
            else:
                return device, path
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), "/dev/loop-control")
    finally:
        os.close(control)


def _check_direct(device: int) -> None:
    status = bytearray(_LOOP_INFO.size)
    fcntl.ioctl(device, _LOOP_GET_STATUS64, status)
    if not _LOOP_INFO.unpack(status)[8] & _LO_FLAGS_DIRECT_IO:
        reason = "no direct I/O there"
        raise OSError(errno.EOPNOTSUPP, reason, "the service's state directory")


def find_attached(image: int) -> tuple[int, str] | None:
    """A descriptor and the path of the loop device of an image, or None if it has none.

    Raises OSError.
    """
    wanted = os.fstat(image)
    for name in os.listdir("/dev"):
        if not name.removeprefix("loop").isdigit():
            continue
        device = os.open(f"/dev/{name}", os.O_RDWR | os.O_CLOEXEC)
        status = bytearray(_LOOP_INFO.size)
        try:
            fcntl.ioctl(device, _LOOP_GET_STATUS64, status)
            info = _LOOP_INFO.unpack(status)
            if info[:2] == (wanted.st_dev, wanted.st_ino):
                return device, f"/dev/{name}"
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: the device has no image
                os.close(device)
                raise
        os.close(device)
    return None


def take_blocks(image: int) -> None:
    """Free the blocks of an image whose file system was shut down and is still mounted.

    After the shutdown the kernel may still write to the image, from the device's cache and by
    requests in flight. So this shrinks the image and the device to zero bytes, and later requests
    fail (EIO). It waits for the requests in flight, and then frees the blocks that these wrote.
    Raises OSError.
    """
    found = find_attached(image)
    if found is None:  # the kernel has detached it meanwhile
        return
    device, _ = found
    try:
        os.ftruncate(image, 0)
        fcntl.ioctl(device, _LOOP_SET_CAPACITY)
        status = bytearray(_LOOP_INFO.size)
        fcntl.ioctl(device, _LOOP_GET_STATUS64, status)
        # This sets what is set already, but the kernel waits for requests in flight first.
        fcntl.ioctl(device, _LOOP_SET_STATUS64, status)
        os.ftruncate(image, 0)
    finally:
        os.close(device)
