"""The note of a job: its room is taken beforehand, so a full disk takes its end."""

import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from attrs import evolve

from jobworker.errors import OutputError
from jobworker.jobs.history.job_note import (
    make_note,
    note_refusal,
    read_news,
    read_note,
    was_refused,
    write_note,
)
from jobworker.model.job import JobId, JobRecord, JobSpec, OutputCut
from jobworker.model.lifecycle import State
from jobworker.serialization.json_text import loads

JOB = JobId(7)


def record(**changes: object) -> JobRecord:
    made = JobRecord(
        id=JOB,
        spec=JobSpec(command=("sh", "-c", "x" * 3000), environment={"A": "1"}),
        owner="alice",
        created_at=datetime(2026, 11, 24, tzinfo=UTC),
    )
    return evolve(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def spools(tmp_path: Path) -> Path:
    (tmp_path / str(JOB)).mkdir()
    return tmp_path


@contextmanager
def no_file_grows_beyond(size: int) -> Iterator[None]:
    """As on a full disk: what stands in a file can be written over, and nothing more (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def note_of(spools: Path) -> Path:
    return spools / str(JOB) / "record"


def test_room_is_taken_at_once_and_whole_blocks_of_it(spools: Path) -> None:
    make_note(spools, record())
    status = note_of(spools).stat()
    assert status.st_size % 4096 == 0
    assert status.st_blocks * 512 >= status.st_size
    assert read_note(spools, JOB) == record()


@pytest.mark.parametrize("changes", [1, 3, 40])
def test_last_word_is_kept_where_the_disk_takes_no_more(spools: Path, changes: int) -> None:
    make_note(spools, record())
    end = record(state=State.STOPPED, discarded_bytes=5, detail="d" * 1000, signal=9)
    with no_file_grows_beyond(note_of(spools).stat().st_size):
        for number in range(changes):
            write_note(spools, record(state=State.RUNNING, stdout_bytes=number))
        write_note(spools, end)
        write_note(spools, end)
    assert read_note(spools, JOB) == end


def test_detail_without_an_end_is_cut_in_the_note_alone(spools: Path) -> None:
    make_note(spools, record())
    with no_file_grows_beyond(note_of(spools).stat().st_size):
        write_note(spools, record(state=State.FAILED, detail="d" * 100_000))
    found = read_note(spools, JOB)
    assert found is not None
    assert (found.state, found.detail) == (State.FAILED, "d" * 1024)


def test_job_without_that_room_is_refused(spools: Path) -> None:
    with (
        no_file_grows_beyond(4096),
        pytest.raises(OutputError, match="cannot create the job's output"),
    ):
        make_note(spools, record())


def test_no_note_is_made_where_there_is_none(spools: Path) -> None:
    write_note(spools, record())
    assert os.listdir(spools / str(JOB)) == []


def test_torn_last_line_is_passed_over(spools: Path) -> None:
    make_note(spools, record())
    write_note(spools, record(state=State.RUNNING))
    data = note_of(spools).read_bytes()
    end = len(data.rstrip(b"\0"))
    note_of(spools).write_bytes(data[: end - 20] + bytes(len(data) - end + 20))
    assert read_note(spools, JOB) == record()


@pytest.mark.parametrize("torn", [1, 20, 300])
def test_line_behind_a_torn_one_is_read(spools: Path, torn: int) -> None:
    make_note(spools, record())
    write_note(spools, record(state=State.RUNNING))
    data = note_of(spools).read_bytes()
    end = len(data.rstrip(b"\0"))
    note_of(spools).write_bytes(data[: end - torn] + bytes(len(data) - end + torn))
    stopped = record(state=State.STOPPED, signal=9)
    write_note(spools, stopped)
    assert read_note(spools, JOB) == read_news(spools, record()) == stopped


@pytest.mark.parametrize("lines", range(1, 25))
def test_lines_are_read_once_a_full_disk_has_room_again(spools: Path, lines: int) -> None:
    """A part of the line that the disk did not take may stand behind all others."""
    make_note(spools, record())
    with no_file_grows_beyond(note_of(spools).stat().st_size):
        for number in range(lines):
            write_note(spools, record(state=State.RUNNING, stdout_bytes=number, detail="d" * 200))
    stopped = record(state=State.STOPPED, signal=9)
    write_note(spools, stopped)
    assert read_note(spools, JOB) == read_news(spools, record()) == stopped
    note_refusal(spools, JOB)
    assert was_refused(spools, JOB)


def test_note_does_not_grow_with_what_is_asked_again_and_again(spools: Path) -> None:
    make_note(spools, record())
    for number in range(400):
        write_note(spools, record(state=State.RUNNING, discarded_bytes=number))
    assert note_of(spools).stat().st_size < 100_000
    assert read_note(spools, JOB) == record(state=State.RUNNING, discarded_bytes=399)


# --- what is new to the history -------------------------------------------------------------

KNOWN = record(spec=JobSpec(command=("kept",)), abridged=("environment",))


@pytest.mark.parametrize("size", [1, 100_000])
def test_news_are_read_without_the_request(spools: Path, size: int) -> None:
    made = record(spec=JobSpec(command=("sh",), environment={"A": "x" * size}))
    make_note(spools, made)
    assert read_news(spools, KNOWN) is None, "what it says was recorded with the admission"
    for number in range(400):
        write_note(spools, evolve(made, state=State.RUNNING, discarded_bytes=number))
    write_note(spools, evolve(made, state=State.STOPPED, detail="\u20ac" * 1024))
    expected = evolve(KNOWN, state=State.STOPPED, detail="\u20ac" * 1024)
    assert read_news(spools, KNOWN) == expected
    data = note_of(spools).read_bytes()
    note_of(spools).write_bytes(b"[" + data[1:])  # no request that could be read
    assert read_news(spools, KNOWN) == expected
    end = len(data.rstrip(b"\0"))
    note_of(spools).write_bytes(data[: end - 20] + bytes(len(data) - end + 20))
    assert read_news(spools, KNOWN) == evolve(KNOWN, state=State.RUNNING, discarded_bytes=399)


def test_note_of_another_job_has_no_news(spools: Path) -> None:
    make_note(spools, record())
    write_note(spools, record(state=State.RUNNING))
    (spools / "8").mkdir()
    (spools / "8" / "record").write_bytes(note_of(spools).read_bytes())
    assert read_news(spools, evolve(KNOWN, id=JobId(8))) is None
    assert read_news(spools, evolve(KNOWN, id=JobId(9))) is None


def test_cut_stays_told_though_an_older_record_comes_behind_it(spools: Path) -> None:
    """One that was on its way to a history which was locked."""
    make_note(spools, record())
    write_note(spools, record(state=State.RUNNING, output_cut=OutputCut.DISK))
    write_note(spools, record(state=State.RUNNING, stop_requested_at=record().created_at))
    for told in (read_news(spools, record()), read_note(spools, JOB)):
        assert told is not None
        assert (told.output_cut, told.stop_requested_at is not None) == (OutputCut.DISK, True)


def test_lines_of_threads_that_write_at_once_all_stand_in_the_note(
    spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each looks for the end of the lines, and is slow to write there."""
    together, pread = threading.Barrier(4), os.pread
    make_note(spools, record())

    def slow_pread(file: int, size: int, offset: int) -> bytes:
        found = pread(file, size, offset)
        time.sleep(0.001)
        return found

    monkeypatch.setattr(os, "pread", slow_pread)

    def write(number: int) -> None:
        together.wait(20)
        for count in range(5):
            write_note(spools, record(state=State.RUNNING, stdout_bytes=100 * number + count))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = note_of(spools).read_bytes().partition(b"\0")[0].splitlines()[1:]
    sizes = {loads(line.decode())["stdout_bytes"] for line in lines}  # type: ignore[index]
    assert sizes == {100 * number + count for number in range(4) for count in range(5)}
