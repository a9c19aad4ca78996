"""Disks in files: made whole, attached once, and gone with their last user."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.disk import loop_devices
from jobworker.sandbox.disk.images import ImageSettings, rounded
from jobworker.storage import MIN_DISK_BYTES

from .conftest import disks_in, until

pytestmark = pytest.mark.alone


@pytest.fixture
def image_settings(open_directory: Callable[[], Path]) -> ImageSettings:
    return ImageSettings(str(open_directory()), {}, "", ())


async def test_image_that_is_attached_is_found_and_not_attached_again(
    image_settings: ImageSettings,
) -> None:
    image = disk_images.create(image_settings, MIN_DISK_BYTES)
    other = disk_images.create(image_settings, MIN_DISK_BYTES)
    assert loop_devices.find_attached(image) is None
    device, path = loop_devices.attach(image)
    found = loop_devices.find_attached(image)
    assert found is not None
    assert found[1] == path
    assert loop_devices.find_attached(other) is None
    assert disks_in(Path(image_settings.directory)) == [path.removeprefix("/dev/")]
    for descriptor in (device, found[0], image, other):
        os.close(descriptor)
    await until(lambda: disks_in(Path(image_settings.directory)) == [])


def test_blank_is_a_formatted_disk_of_few_blocks(image_settings: ImageSettings) -> None:
    size = rounded((100 << 20) + 1234)
    blank = disk_images.make_template(image_settings, size)
    assert size % 4096 == 0
    assert blank.size == size
    assert len(blank.blocks) < 100
    written = disk_images.create(image_settings._replace(templates={size: blank}), size)
    formatted = disk_images.create(image_settings, size)
    assert os.pread(written, 2, 1024 + 56) == os.pread(formatted, 2, 1024 + 56) == b"\x53\xef"
    assert os.fstat(written).st_size == size
    assert os.fstat(written).st_blocks * 512 < 1 << 20, "it takes what is written, no more"
    os.close(written)
    os.close(formatted)


def test_disk_without_room_is_refused(image_settings: ImageSettings) -> None:
    with pytest.raises(OSError, match="No space left"):
        disk_images.create(image_settings, 1 << 50)
    assert os.listdir(image_settings.directory) == []
