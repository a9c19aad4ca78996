"""The index on disk, with the records that only memory has so far."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attrs import evolve

from jobworker.jobs.output.file_reads import FileReads
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.index import BLOCK_RECORDS, EMPTY, RECORD, Record
from jobworker.jobs.output.index_file import IndexFile
from jobworker.model.job import Stream

from .written_logs import (
    ERR,
    MERGED,
    OUT,
    PIECES,
    file_size_limit,
    joined,
    no_descriptor_leaks,
    read_all,
    written,
)

__all__ = ["no_descriptor_leaks"]


def test_zeroes_after_a_power_cut_are_no_records(tmp_path: Path) -> None:
    with written(tmp_path / "job"):
        pass
    with (tmp_path / "job" / "index").open("r+b") as index:
        index.truncate(4096)
    files = OutputFiles.open(tmp_path / "job")
    assert files.records == len(PIECES)
    assert joined(read_all(files)) == MERGED
    files.close()


def records(*lengths: tuple[int, int, int]) -> list[Record]:
    """One record for each state: lengths of stdout and stderr, and discarded bytes."""
    return [Record(number, *each) for number, each in enumerate(lengths, 1)]


@contextmanager
def index_of(path: Path, stored: list[Record]) -> Iterator[IndexFile]:
    path.write_bytes(b"".join(each.pack() for each in stored))
    fd = os.open(path, os.O_RDWR)
    try:
        yield IndexFile(fd, FileReads())
    finally:
        os.close(fd)


PLENTY = {OUT: 1 << 30, ERR: 1 << 30}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index"


def test_index_is_loaded_up_to_its_last_record_which_may_be_the_seal(path: Path) -> None:
    stored = records((3, 0, 0), (3, 5, 0), (3, 5, 9))
    with index_of(path, stored) as index:
        assert index.load(PLENTY) == (stored[-1], False)
        assert (index.records, index.last, index.cut_records) == (3, stored[-1], 0)
    seal = evolve(stored[-1], time_ns=7)
    with index_of(path, [*stored, seal]) as index:
        assert index.load(PLENTY) == (seal, True)
        assert (index.records, index.last) == (4, seal)
        index.cut_seal()
        assert (index.records, index.last) == (3, stored[-1])
        assert path.stat().st_size == 4 * RECORD.size, "the file has it for now"
        index.truncate()
        assert path.stat().st_size == 3 * RECORD.size


def test_empty_index_has_no_records(path: Path) -> None:
    with index_of(path, []) as index:
        assert index.load(PLENTY) == (EMPTY, False)
        assert (index.records, index.last, index.record(-1)) == (0, EMPTY, EMPTY)


@pytest.mark.parametrize(
    ("sizes", "left"), [((3, 5), 3), ((3, 4), 1), ((2, 5), 0), ((9, 0), 1), ((7, 7), 3)]
)
def test_records_of_bytes_that_are_gone_are_cut_and_told(
    path: Path, sizes: tuple[int, int], left: int
) -> None:
    stored = records((3, 0, 0), (3, 5, 0), (3, 5, 9))
    with index_of(path, stored) as index:
        told, _ = index.load(dict(zip(Stream, sizes, strict=True)))
        assert told == stored[-1], "the last one that follows, though its bytes are gone"
        assert (index.records, index.cut_records) == (left, 3 - left)
        assert index.last == (stored[left - 1] if left else EMPTY)


def test_records_that_follow_nothing_are_cut_and_tell_nothing(path: Path) -> None:
    stored = records((3, 0, 0), (3, 5, 0))
    wild = [Record(9, 8, 8, 8), Record(0, 0, 0, 0), Record(9, 1 << 40, 5, 0)]
    with index_of(path, [*stored, *wild]) as index:
        assert index.load(PLENTY) == (stored[-1], False)
        assert (index.records, index.cut_records) == (2, 3)


def test_torn_record_at_the_end_is_no_record(path: Path) -> None:
    stored = records((3, 0, 0), (3, 5, 0))
    with index_of(path, stored) as index:
        os.truncate(path, 2 * RECORD.size - 1)
        assert index.load(PLENTY) == (stored[0], False)
        assert (index.records, index.cut_records) == (1, 0)


def test_records_in_memory_are_read_as_those_of_the_file_until_they_are_written(
    path: Path,
) -> None:
    stored = records((3, 0, 0), (3, 5, 0), (4, 5, 0), (5, 5, 0))
    with index_of(path, stored[:2]) as index:
        index.load(PLENTY)
        for each in stored[2:]:
            index.add(each)
        assert path.stat().st_size == 2 * RECORD.size
        for number, each in enumerate(stored):
            assert index.record(number) == each
        assert index.block(0, nowait=False) == b"".join(each.pack() for each in stored[:2])
        assert index.block(2, nowait=False) == b"".join(each.pack() for each in stored[2:])
        assert index.block(3, nowait=False) == stored[3].pack()
        index.flush()
        assert path.read_bytes() == b"".join(each.pack() for each in stored)
        assert index.block(0, nowait=False) == path.read_bytes()
        os.truncate(path, 0)  # a second flush has nothing to write
        index.flush()
        assert path.stat().st_size == 0


def test_block_has_a_bounded_number_of_records(path: Path) -> None:
    stored = [Record(number, number, 0, 0) for number in range(1, BLOCK_RECORDS + 6)]
    with index_of(path, stored) as index:
        index.load(PLENTY)
        assert len(index.block(0, nowait=False)) == BLOCK_RECORDS * RECORD.size
        assert len(index.block(BLOCK_RECORDS, nowait=False)) == 5 * RECORD.size


def test_record_that_the_disk_refuses_is_neither_in_the_file_nor_in_the_log(path: Path) -> None:
    stored = records((3, 0, 0), (4, 0, 0), (5, 0, 0))
    with index_of(path, stored[:1]) as index:
        index.load(PLENTY)
        with file_size_limit(RECORD.size + 5), pytest.raises(OSError, match="too large"):
            index.write(stored[1])
        assert (index.records, index.last) == (1, stored[0])
        index.write(stored[1])  # overwrites the torn one
        index.write(stored[2])
        assert path.read_bytes() == b"".join(each.pack() for each in stored)
        assert (index.records, index.last) == (3, stored[2])


def test_flush_that_the_disk_refuses_keeps_the_records_in_memory(path: Path) -> None:
    stored = records((3, 0, 0), (4, 0, 0), (5, 0, 0))
    with index_of(path, []) as index:
        for each in stored:
            index.add(each)
        with file_size_limit(2 * RECORD.size - 1), pytest.raises(OSError, match="too large"):
            index.flush()
        assert [index.record(number) for number in range(3)] == stored
        index.flush()
        assert path.read_bytes() == b"".join(each.pack() for each in stored)
