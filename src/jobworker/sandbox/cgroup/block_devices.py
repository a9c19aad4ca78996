"""Lists the host's block devices for which an I/O limit has to be set.

The kernel takes a limit for a device by its number, and for whole disks only (a partition gives
ENODEV). The descriptor of /sys/block is kept open, so that a disk that is plugged in after the
start is limited for later jobs.

Three kinds of devices are left out. Memory disks (ram0…) are no storage. A device without a size,
such as an empty card reader, takes no I/O. The I/O of a loop device is charged to its user on the
disk below, and limited there. A device on top of others (device mapper, md) has a limit like any
other. Its bytes are counted again on the device below, like those of loop devices; see
`is_counted_below`.

Source: Documentation/ABI/stable/sysfs-block.
"""

import os
from typing import NamedTuple

from jobworker.sandbox.cgroup.files import DIRECTORY, GONE, read

_LOOP = "7:"
"""The major number of loop devices: Documentation/admin-guide/devices.txt."""


class Device(NamedTuple):
    """A whole block device. `number` is "MAJOR:MINOR"; `stacked`: it is on top of others."""

    number: str
    stacked: bool


def open_directory(path: str = "/sys/block") -> int:
    """A descriptor of /sys/block for `scan`. Raises OSError."""
    return os.open(path, DIRECTORY)


def scan(directory: int) -> tuple[Device, ...]:
    """The devices that exist now, in the order of their names. Raises OSError."""
    devices = []
    for name in sorted(os.listdir(directory)):
        if name.startswith(("ram", "loop")):
            continue
        try:
            if int(read(directory, f"{name}/size")) > 0:
                number = read(directory, f"{name}/dev").strip()
                devices.append(Device(number, _is_stacked(directory, name)))
        except OSError as error:
            # The disk was just unplugged, or it is a hidden path of a multipath disk (no number).
            if error.errno not in GONE:
                raise
    return tuple(devices)


def is_counted_below(number: str, stacked: frozenset[str]) -> bool:
    """Whether a device's bytes are counted again on a device below it.

    `stacked`: the numbers of the stacked devices, from `scan`.
    """
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
