"""A job's output on disk: no byte is lost by a crash or a full disk."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from jobworker.errors import Busy, OutputError
from jobworker.jobs.output.file_reads import FileReads
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.index import RECORD, Place, ReadFilter

from .written_logs import (
    ERR,
    MERGED,
    OUT,
    PIECES,
    Clock,
    append,
    file_size_limit,
    joined,
    log_as_told,
    no_descriptor_leaks,
    read_all,
    written,
)

__all__ = ["no_descriptor_leaks"]


def test_an_empty_pipe_is_not_its_end(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()  # blocking ends: splice must not wait all the same
    with written(tmp_path / "job") as files:
        with pytest.raises(BlockingIOError):
            files.append_from_pipe(OUT, read_end, 100)
        os.close(write_end)
        assert files.append_from_pipe(OUT, read_end, 100) == 0
        os.close(read_end)
        assert files.last.size == len(MERGED)


def test_what_a_full_disk_refuses_stays_in_the_pipe(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(10_000)
    read_end, write_end = os.pipe()
    os.write(write_end, data)
    os.close(write_end)
    files = OutputFiles.create(tmp_path / "job")
    with file_size_limit(6_000):
        assert files.append_from_pipe(OUT, read_end, 20_000) == 6_000
        with pytest.raises(OutputError, match="cannot write the job's output: File too large"):
            files.append_from_pipe(OUT, read_end, 20_000)
    assert joined(read_all(files)) == data[:6_000]
    assert files.append_from_pipe(OUT, read_end, 20_000) == 4_000
    assert joined(read_all(files)) == data
    os.close(read_end)
    files.close()


def test_bytes_whose_record_was_refused_are_in_the_log_and_recorded_later(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"abcdef")
    files = OutputFiles.create(tmp_path / "job")
    with file_size_limit(2 * RECORD.size + 5):  # the third record is torn
        assert files.append_from_pipe(OUT, read_end, 1) == 1
        assert files.append_from_pipe(ERR, read_end, 1) == 1
        for _ in range(2):
            with pytest.raises(OutputError):
                files.append_from_pipe(OUT, read_end, 1)
        assert files.last.size == files.written_bytes == 3
        assert joined(read_all(files)) == b"abc"
        files.seal()  # the disk refuses that too
        assert files.sealed
        assert joined(read_all(files)) == b"abc"
    assert (tmp_path / "job" / "index").stat().st_size == 2 * RECORD.size + 5
    files.close()
    files = OutputFiles.open(tmp_path / "job")
    assert not files.sealed
    assert joined(read_all(files)) == b"abc"
    assert files.append_from_pipe(ERR, read_end, 10) == 3
    assert joined(read_all(files), ERR) == b"bdef"
    for fd in (read_end, write_end):
        os.close(fd)
    files.close()


@pytest.mark.parametrize("number", range(len(PIECES)))
def test_log_whose_last_record_was_refused_is_the_same_after_a_crash(
    tmp_path: Path, number: int
) -> None:
    files = OutputFiles.create(tmp_path / "job", clock=Clock())
    with file_size_limit(number * RECORD.size + 5):
        for stream, data in PIECES[:number]:
            append(files, stream, data)
        with pytest.raises(OutputError):
            append(files, *PIECES[number])
        told = log_as_told(files)
    files.close()
    assert [piece for _, *piece in told] == [list(piece) for piece in PIECES[: number + 1]]
    ended = OutputFiles.open_ended(tmp_path / "job")
    assert log_as_told(ended) == told
    ended.close()
    files = OutputFiles.open(tmp_path / "job")
    assert log_as_told(files) == told
    files.close()


def test_full_disk_at_the_opening_loses_nothing(tmp_path: Path) -> None:
    files = OutputFiles.create(tmp_path / "job")
    append(files, OUT, b"seen")
    files.close()
    with (tmp_path / "job" / "stdout").open("ab") as data:
        data.write(b" unrecorded")
    with file_size_limit(RECORD.size):
        files = OutputFiles.open(tmp_path / "job")
        assert joined(read_all(files)) == b"seen unrecorded"
        with pytest.raises(OutputError):
            append(files, OUT, b" more")
        assert joined(read_all(files)) == b"seen unrecorded"
    append(files, OUT, b" more")
    assert joined(read_all(files)) == b"seen unrecorded more"
    files.close()


def test_a_damaged_index_is_an_error(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        files.seal()
    raw = bytearray((tmp_path / "job" / "index").read_bytes())
    raw[RECORD.size : 2 * RECORD.size] = bytes(RECORD.size)
    (tmp_path / "job" / "index").write_bytes(raw)
    files = OutputFiles.open(tmp_path / "job")
    with pytest.raises(OutputError, match="record 1 does not follow record 0"):
        read_all(files)
    files.close()


def test_that_output_was_discarded_survives_the_process(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        for count in (5, 4, 1, 3):
            files.count_discarded(count)
    files = OutputFiles.open(tmp_path / "job")
    assert files.discarded_bytes == 10  # recorded whenever it doubles; the sum, when sealed
    files.count_discarded(2)
    files.seal()
    files.close()
    files = OutputFiles.open(tmp_path / "job")
    assert files.sealed
    assert files.discarded_bytes == 12
    assert joined(read_all(files)) == MERGED
    files.close()


# --- without a repair -------------------------------------------------------------------------


def tree_with_times(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {each.name: (each.read_bytes(), each.stat().st_mtime_ns) for each in directory.iterdir()}


@pytest.mark.parametrize("look", [OutputFiles.look_at, OutputFiles.open_ended])
def test_look_changes_no_file(tmp_path: Path, look: Callable[[Path], OutputFiles]) -> None:
    with written(tmp_path / "job"):
        pass
    os.truncate(tmp_path / "job" / "stderr", 1)
    with (tmp_path / "job" / "index").open("ab") as file:
        file.write(b"torn")
    before = tree_with_times(tmp_path / "job")
    files = look(tmp_path / "job")
    files.close()
    assert tree_with_times(tmp_path / "job") == before


def test_only_a_log_that_loses_no_records_can_be_sealed(tmp_path: Path) -> None:
    with written(tmp_path / "job"):
        pass
    files = OutputFiles.look_at(tmp_path / "job")
    assert files.can_be_sealed
    files.close()
    os.truncate(tmp_path / "job" / "stdout", 4)
    files = OutputFiles.look_at(tmp_path / "job")
    assert not files.can_be_sealed
    files.close()
    files = OutputFiles.open(tmp_path / "job")
    files.seal()
    assert not files.can_be_sealed
    files.close()


def test_sealed_files_that_are_being_read_are_not_removed(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        files.seal()
    for opened in (OutputFiles.open, OutputFiles.open_ended):
        reader, other = opened(tmp_path / "job"), OutputFiles.look_at(tmp_path / "job")
        with pytest.raises(Busy, match="it is being read"):
            other.remove(tmp_path / "job", force=False)
        reader.close()
        other.close()
    last = OutputFiles.look_at(tmp_path / "job")
    last.remove(tmp_path / "job", force=False)
    last.close()
    assert not (tmp_path / "job").exists()


# --- parts ------------------------------------------------------------------------------------


def test_only_files_with_output_are_to_be_synced(tmp_path: Path) -> None:
    def names(files: OutputFiles) -> list[str]:
        return [Path(os.readlink(f"/proc/self/fd/{fd}")).name for fd in files.to_sync()]

    files = OutputFiles.create(tmp_path / "job")
    assert names(files) == []
    append(files, ERR, b"err")
    assert names(files) == ["stderr", "index"]
    append(files, OUT, b"out")
    assert names(files) == ["stdout", "stderr", "index"]
    assert files.size_on_disk() == 6 + 2 * RECORD.size
    files.close()


def test_files_are_let_go_once(tmp_path: Path) -> None:
    files = OutputFiles.create(tmp_path / "job")
    fds = files.let_go()
    assert len(fds) == 3
    assert files.let_go() == []
    files.close()
    for fd in fds:
        os.fstat(fd)  # they are the caller's now
        os.close(fd)
    nothing = OutputFiles.gone()
    assert (nothing.let_go(), nothing.to_sync(), nothing.last.size) == ([], [], 0)


def test_short_read_of_the_page_cache_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with written(tmp_path / "job") as files:
        read = FileReads.read

        def short(self: FileReads, fd: int, size: int, offset: int, *, nowait: bool) -> object:
            data = read(self, fd, size, offset, nowait=nowait)
            return data[:1] if nowait and size < RECORD.size else data

        monkeypatch.setattr(FileReads, "read", short)
        got, place = b"", Place()
        while place.offset < files.last.size:
            chunk, place = files.read(place, ReadFilter(), nowait=True)
            got += b"" if chunk is None else bytes(chunk.data)
    assert got == MERGED


def test_place_at_each_offset_is_found(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        for offset in range(len(MERGED) + 1):
            place = files.find(offset, nowait=False)
            assert place.offset == offset
            assert joined(read_all(files, place)) == MERGED[offset:]


def test_seal_stands_after_the_exact_count_of_discarded_bytes(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        files.count_discarded(10)
        files.count_discarded(9)  # less than double: not in the index yet
        files.seal()
        assert files.record(files.records - 1).seals(files.record(files.records - 2))
    files = OutputFiles.look_at(tmp_path / "job")
    assert (files.sealed, files.discarded_bytes) == (True, 19)
    files.close()


def test_log_whose_count_cannot_be_recorded_has_no_seal_on_disk(tmp_path: Path) -> None:
    """Else a reader would take the log for one that has lost less."""
    with written(tmp_path / "job") as files:
        files.discarded_bytes = 10
        with file_size_limit(len(PIECES) * RECORD.size):
            assert not files.record_discarded()
            files.seal()
        assert files.sealed
    files = OutputFiles.look_at(tmp_path / "job")
    assert not files.sealed
    files.close()
