"""Probes of disks in files: file systems of a fixed size for jobs.

Each probe makes an image in the directory that the service will use. The image is a file without a
name, so nothing of it stays.

Standard library only.
"""

import errno
import os
from collections.abc import Iterable
from functools import partial

from jobworker.model.units import MEBIBYTE
from jobworker.sandbox.check.mounts import on_stage
from jobworker.sandbox.check.probing import Missing, Probe
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.disk.images import Disk, ImageSettings
from jobworker.storage import MIN_DISK_BYTES


def probes(directory: str) -> Iterable[Probe]:
    """The probes of this module; `directory` is the service's directory for disks."""
    formatted = "install e2fsprogs, and keep worker.state_dir on a local file system with room"
    attached = "load them (modprobe loop ext4); keep worker.state_dir on a file system that does "
    attached += "direct I/O, such as ext4 or xfs; in a container, give it the loop devices"
    yield Probe("disks", "disk image (mke2fs)", partial(_made, directory), formatted)
    bounded = partial(_bounded, directory)
    yield Probe("disks", "disk with a bound (loop, ext4)", bounded, attached)


def _image(directory: str) -> int:
    return disk_images.create(ImageSettings(directory, {}, "", ()), MIN_DISK_BYTES)


def _made(directory: str) -> str:
    image = _image(directory)
    return f"O_TMPFILE, {os.fstat(image).st_blocks >> 1} KiB for an empty one"


def _bounded(directory: str) -> str:
    # Make the image first: the stage may be mounted on a parent of the directory.
    return on_stage(partial(_filled, _image(directory)))


def _filled(image: int, stage: str) -> str:
    place = f"{stage}/disk"
    os.mkdir(place)
    disk_images.mount_image(image, place)
    try:
        with open(f"{place}/big", "wb", buffering=0) as file:
            while file.tell() <= MIN_DISK_BYTES:
                file.write(b"\1" * MEBIBYTE)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            root = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            disk_images.discard(Disk(root, disk_images.open_again(image)))
            return "loop device, direct I/O, ext4"
        raise
    raise Missing("it takes more than its size")
