"""The host's whole block devices, as an I/O limit needs them.

A limit is set for each device by its number, whole disks only (a partition gives ENODEV). The
descriptor of /sys/block is kept, so that a disk that was plugged in, or a loop device that was
set up, after the start is limited too for the jobs that follow.

Memory disks (ram0…) are no storage, and a device without a size (an empty loop device or card
reader) takes no I/O: both are left out. A device that stands on others (device mapper, md, loop)
is limited like any, but its bytes are counted a second time below it: `stacked`.

Source: Documentation/ABI/stable/sysfs-block.
"""

import os
from typing import NamedTuple

from jobworker.sandbox.cgroup_files import DIRECTORY, GONE, read


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
        if name.startswith("ram"):
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


def _is_stacked(directory: int, name: str) -> bool:
    if name.startswith("loop"):
        return True
    try:
        descriptor = os.open(f"{name}/slaves", DIRECTORY, dir_fd=directory)
    except FileNotFoundError:
        return False
    try:
        return bool(os.listdir(descriptor))
    finally:
        os.close(descriptor)
