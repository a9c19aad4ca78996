"""The host's whole block devices, as an I/O limit needs them.

A limit is set for each device by its number, whole disks only (a partition gives ENODEV). The
descriptor of /sys/block is kept, so that a disk that was plugged in after the start is limited too
for the jobs that follow.

Memory disks (ram0…) are no storage, a device without a size (an empty card reader) takes no I/O,
and what a loop device does the kernel does to the disk below in the name of whoever asked for it:
all three are left out. A device that stands on others (device mapper, md) is limited like any, but
its bytes are counted a second time below it, as are those of loop devices: `is_counted_below`.

Source: Documentation/ABI/stable/sysfs-block.
"""

import os
from typing import NamedTuple

from jobworker.sandbox.cgroup.files import DIRECTORY, GONE, read

_LOOP = "7:"
"""The major number of loop devices: Documentation/admin-guide/devices.txt."""


class Device(NamedTuple):
    """A whole block device, `number` being "MAJOR:MINOR"."""

    number: str
    stacked: bool


def open_directory(path: str = "/sys/block") -> int:
    """A descriptor to pass to `scan`; raises OSError."""
    return os.open(path, DIRECTORY)


def scan(directory: int) -> tuple[Device, ...]:
    """The devices that exist now."""
    devices = []
    for name in sorted(os.listdir(directory)):
        if name.startswith(("ram", "loop")):
            continue
        try:
            if int(read(directory, f"{name}/size")) > 0:
                number = read(directory, f"{name}/dev").strip()
                devices.append(Device(number, _is_stacked(directory, name)))
        except OSError as error:
            # Just unplugged, or a hidden path of a multipath disk, which has no number.
            if error.errno not in GONE:
                raise
    return tuple(devices)


def is_counted_below(number: str, stacked: frozenset[str]) -> bool:
    """Whether a device's bytes are counted for another one too; `stacked` are those of `scan`."""
    return number in stacked or number.startswith(_LOOP)


def _is_stacked(directory: int, name: str) -> bool:
    try:
        descriptor = os.open(f"{name}/slaves", DIRECTORY, dir_fd=directory)
    except FileNotFoundError:
        return False
    try:
        return bool(os.listdir(descriptor))
    finally:
        os.close(descriptor)
