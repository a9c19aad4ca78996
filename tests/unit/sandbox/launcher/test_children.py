"""What the pool of children releases of an ended one."""

from collections import deque
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox.disk.images import Disk
from jobworker.sandbox.disk.volumes import VolumeStore
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.sweepers import Sweepers
from jobworker.sandbox.root.stage import Stage

from .conftest import new_child


def test_what_a_child_held_is_handed_over_once_though_clearing_it_fails() -> None:
    pool, discarded, closed = ChildPool.__new__(ChildPool), list[Disk](), list[list[int]]()

    def discard_disk(disk: Disk, overlay: int | None, *, shared: bool) -> None:
        discarded.append(disk)
        raise KeyError("unforeseen")

    def close(descriptors: list[int]) -> None:
        closed.append(descriptors)
        raise KeyError("unforeseen")

    sweepers = SimpleNamespace(discard_disk=discard_disk, close=close)
    volumes = SimpleNamespace(release=lambda _: None)
    pool.sweepers, pool.volumes = cast("Sweepers", sweepers), cast("VolumeStore", volumes)
    pool._stage = cast("Stage", SimpleNamespace(view=SimpleNamespace(scratch="")))
    pool._free = deque()
    child = new_child(0)
    child.disk, child.volume_roots = Disk(100, 101), {"kept": 102}
    with pytest.raises(KeyError):
        pool.discard_disk(child)
    pool.discard_disk(child)
    assert discarded == [Disk(100, 101)], "the numbers are others' by now"
    for _ in range(2):
        with pytest.raises(KeyError):
            pool.release_volumes(child)
    assert closed == [[102], []]
