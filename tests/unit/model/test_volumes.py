"""Volumes: which names and sizes they have, and which mounts a job may have together."""

from typing import Any

import pytest

from jobworker.errors import InvalidParams
from jobworker.model.volumes import Volume, VolumeMount, check_mounts
from jobworker.storage import MAX_DISK_BYTES, MAX_VOLUMES, MIN_DISK_BYTES


def mount(name: str, path: str = "") -> VolumeMount:
    return VolumeMount(name=name, path=path)


def faults(*mounts: VolumeMount) -> str:
    try:
        check_mounts(None, None, mounts)
    except ValueError as fault:
        return str(fault)
    return ""


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "x" * 63])
def test_name_is_taken(name: str) -> None:
    assert mount(name).name == name


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "a b", "ä", "a\n", "x" * 64])
def test_other_text_is_no_name(name: str) -> None:
    with pytest.raises(InvalidParams, match="is no name"):
        mount(name)
    with pytest.raises(ValueError, match="is no name"):
        Volume(name=name, size_bytes=MIN_DISK_BYTES)


def test_volume_without_a_path_is_mounted_by_its_name() -> None:
    assert mount("cache").place == "/volumes/cache"
    assert mount("cache", "/data").place == "/data"


@pytest.mark.parametrize("path", ["data", "/", "/a/../b", "/proc/x", "/etc", "/a\0b"])
def test_place_that_the_sandbox_needs_is_refused(path: str) -> None:
    with pytest.raises(InvalidParams, match="cannot make a VolumeMount: path: must"):
        mount("cache", path)


def test_mounts_of_different_volumes_at_different_places_are_taken() -> None:
    assert faults() == ""
    assert faults(mount("a"), mount("b"), mount("c", "/c"), mount("d", "/cd")) == ""


def test_number_of_mounts_is_bounded() -> None:
    mounts = [mount(f"v{number}") for number in range(MAX_VOLUMES + 1)]
    assert faults(*mounts[1:]) == ""
    assert faults(*mounts) == f"has {MAX_VOLUMES + 1} volumes; at most {MAX_VOLUMES} are allowed"


def test_volume_is_mounted_once() -> None:
    assert faults(mount("a", "/x"), mount("b"), mount("a", "/y")) == "names the volume 'a' twice"


def test_place_has_one_volume() -> None:
    assert faults(mount("a", "/x"), mount("b", "/x")) == "puts two volumes at /x"
    assert faults(mount("a", "/volumes/b"), mount("b")) == "puts two volumes at /volumes/b"


@pytest.mark.parametrize("turned", [False, True])
def test_volume_is_not_mounted_inside_of_another(*, turned: bool) -> None:
    mounts = [mount("a", "/x"), mount("b", "/x/y")]
    told = faults(*(reversed(mounts) if turned else mounts))
    assert told == "puts a volume inside of another one, at /x/y"


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("size_bytes", MIN_DISK_BYTES, MAX_DISK_BYTES),
        ("used_bytes", 0, 1 << 60),
        ("jobs", 0, 1 << 30),
    ],
)
def test_listed_volume_has_its_bounds(name: str, low: int, high: int) -> None:
    def volume(value: int) -> Volume:
        fields: dict[str, Any] = {"name": "a", "size_bytes": MIN_DISK_BYTES, name: value}
        return Volume(**fields)

    for value in (low, high):
        assert getattr(volume(value), name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"must be from {low} to {high}, not {value}"):
            volume(value)
