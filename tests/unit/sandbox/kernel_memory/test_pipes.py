"""What a pipe tells of what it holds."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.sandbox.kernel_memory import pipes as kernel_pipes
from jobworker.sandbox.kernel_memory.pipes import PAGE_BYTES, SLOT_BYTES, InPipe


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_reading_end_tells_whether_there_is_something(ends: tuple[int, int]) -> None:
    reader, writer = ends
    assert kernel_pipes.is_filled(reader) is False
    os.write(writer, b"x")
    assert kernel_pipes.is_filled(reader) is True
    os.read(reader, 1)
    assert kernel_pipes.is_filled(reader) is False


def test_reading_end_whose_writers_have_gone_is_filled_by_what_they_wrote() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x")
    os.close(writer)
    assert kernel_pipes.is_filled(reader) is True
    os.read(reader, 1)
    assert kernel_pipes.is_filled(reader) is False
    os.close(reader)


def test_writing_end_cannot_tell(ends: tuple[int, int]) -> None:
    os.write(ends[1], b"x")
    assert kernel_pipes.is_filled(ends[1]) is None


def test_both_ends_of_a_named_pipe_tell(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    both = os.open(tmp_path / "pipe", os.O_RDWR)
    assert kernel_pipes.is_filled(both) is False
    os.write(both, b"x")
    assert kernel_pipes.is_filled(both) is True
    assert kernel_pipes.held_in(both) == InPipe(1, SLOT_BYTES)
    os.close(both)


@pytest.mark.parametrize("end", [0, 1])
def test_pipe_holds_its_bytes_and_at_most_what_its_slots_keep(
    ends: tuple[int, int], end: int
) -> None:
    slots = fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 8 * PAGE_BYTES) // PAGE_BYTES
    assert kernel_pipes.held_in(ends[end]) == InPipe(0, 0)
    os.write(ends[1], b"xyz")
    assert kernel_pipes.held_in(ends[end]) == InPipe(3, 3 * SLOT_BYTES)
    os.write(ends[1], bytes(7 * PAGE_BYTES))
    assert kernel_pipes.held_in(ends[end]) == InPipe(7 * PAGE_BYTES + 3, slots * SLOT_BYTES)


def test_no_pipe_keeps_more_than_the_most(ends: tuple[int, int]) -> None:
    largest = int(Path("/proc/sys/fs/pipe-max-size").read_text())
    slots = fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, largest) // PAGE_BYTES
    assert slots * SLOT_BYTES <= kernel_pipes.most_in_one()
