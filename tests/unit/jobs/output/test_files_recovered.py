"""A job's output that is opened again: repaired, and no byte of it lost."""

import os
from pathlib import Path

import pytest

from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.index import RECORD, LogChunk, ReadFilter
from jobworker.model.job import Stream

from .written_logs import (
    ERR,
    MERGED,
    OUT,
    PIECES,
    append,
    joined,
    no_descriptor_leaks,
    read_all,
    written,
)

__all__ = ["no_descriptor_leaks"]


def reopen(directory: Path) -> tuple[bool, list[LogChunk], dict[Stream, bytes]]:
    """Recover, write on, and seal; what stands in the log, and in its files before that."""
    kept = {stream: (directory / stream.name.lower()).read_bytes() for stream in Stream}
    files = OutputFiles.open(directory)
    was_sealed = files.sealed
    chunks = read_all(files, view=ReadFilter(coalesce=False))
    if not was_sealed:
        append(files, OUT, b"more")
        assert joined(read_all(files), OUT) == kept[OUT] + b"more"
        files.seal()
    files.close()
    again = OutputFiles.open(directory)
    assert again.sealed
    assert again.last == files.last
    again.close()
    return was_sealed, chunks, kept


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("discarded", [0, 9])
def test_every_cut_of_the_index_recovers_every_byte(
    tmp_path: Path, sealed: bool, discarded: int
) -> None:
    with written(tmp_path / "model") as files:
        if discarded:
            files.count_discarded(discarded)
        if sealed:
            files.seal()
    index = (tmp_path / "model" / "index").read_bytes()
    streams = {s: b"".join(data for each, data in PIECES if each is s) for s in Stream}
    for cut in range(len(index) + 1):
        job = tmp_path / f"cut{cut}"
        job.mkdir()
        for stream in Stream:
            (job / stream.name.lower()).write_bytes(streams[stream])
        (job / "index").write_bytes(index[:cut])
        was_sealed, chunks, _ = reopen(job)
        assert was_sealed == (sealed and cut == len(index))
        for stream in Stream:
            assert joined(chunks, stream) == streams[stream]
        whole = min(cut // RECORD.size, len(PIECES))
        intact = [(chunk.stream, chunk.data) for chunk in chunks][:whole]
        assert intact == PIECES[:whole]


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize("sealed", [False, True])
def test_every_cut_of_the_data_recovers_what_is_left(
    tmp_path: Path, stream: Stream, sealed: bool
) -> None:
    with written(tmp_path / "model") as files:
        if sealed:
            files.seal()
    contents = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    name = stream.name.lower()
    for cut in range(len(contents[name]) + 1):
        job = tmp_path / f"cut{cut}"
        job.mkdir()
        for each, content in contents.items():
            (job / each).write_bytes(content[:cut] if each == name else content)
        was_sealed, chunks, kept = reopen(job)
        assert was_sealed == (sealed and cut == len(contents[name]))
        for each_stream in Stream:
            assert joined(chunks, each_stream) == kept[each_stream]


def test_log_of_a_live_job_goes_on_before_its_seal(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        files.seal()
        files.seal()
        records = files.records
    files = OutputFiles.open(tmp_path / "job", goes_on=True)
    assert (files.sealed, files.records) == (False, records - 1)
    assert (tmp_path / "job" / "index").stat().st_size == (records - 1) * RECORD.size
    append(files, OUT, b"more")
    assert joined(read_all(files)) == MERGED + b"more"
    files.close()


@pytest.mark.parametrize(
    "garbage", [b"torn", b"torn" * 100, b"\x01" * 320, b"\x7f" * 320, b"\xff" * 320]
)
def test_garbage_at_the_end_of_the_index_is_cut_off(tmp_path: Path, garbage: bytes) -> None:
    """Equal records look like seals of each other, whatever impossible lengths they tell of."""
    with written(tmp_path / "job"):
        pass
    with (tmp_path / "job" / "index").open("ab") as file:
        file.write(garbage)
    for look in (OutputFiles.look_at, OutputFiles.open_ended):
        files = look(tmp_path / "job")
        assert joined(read_all(files)) == MERGED
        files.close()
    files = OutputFiles.open(tmp_path / "job")
    files.count_discarded(5)
    append(files, OUT, b"more")
    files.seal()
    counted = files.discarded_bytes
    files.close()
    files = OutputFiles.open(tmp_path / "job")
    assert (files.sealed, files.discarded_bytes) == (True, counted)
    assert joined(read_all(files)) == MERGED + b"more"
    files.close()


def test_torn_end_of_the_index_is_cut_off(tmp_path: Path) -> None:
    with written(tmp_path / "job"):
        pass
    index = tmp_path / "job" / "index"
    with index.open("ab") as file:
        file.write(b"torn" * 9)
    OutputFiles.open(tmp_path / "job").close()
    assert index.stat().st_size == len(PIECES) * RECORD.size


def test_bytes_without_a_record_have_the_time_of_their_file(tmp_path: Path) -> None:
    with written(tmp_path / "job"):
        pass
    for name, when in (("stdout", 1000), ("stderr", 2000)):
        with (tmp_path / "job" / name).open("ab") as file:
            file.write(b"late")
        os.utime(tmp_path / "job" / name, ns=(when, when))
    for reopen_ in (OutputFiles.open_ended, OutputFiles.open):
        files = reopen_(tmp_path / "job")
        last = read_all(files, view=ReadFilter(coalesce=False))[-2:]
        assert [(each.time_ns, each.stream, each.data) for each in last] == [
            (1000, OUT, b"late"),
            (2000, ERR, b"late"),
        ]
        files.close()


def test_lost_bytes_count_as_discarded_also_for_the_next_opening(tmp_path: Path) -> None:
    with written(tmp_path / "job"):
        pass
    os.truncate(tmp_path / "job" / "stdout", 4)
    for lost in (4, 0):
        files = OutputFiles.open(tmp_path / "job")
        assert (files.lost, files.discarded_bytes) == ({OUT: lost, ERR: 0}, 4)
        files.close()


def test_count_of_records_that_are_cut_with_their_bytes_is_kept(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        files.count_discarded(9)
    os.truncate(tmp_path / "job" / "stdout", 4)
    files = OutputFiles.look_at(tmp_path / "job")
    assert files.discarded_bytes == 9
    files.close()
