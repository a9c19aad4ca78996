"""The output of ended jobs: sealed late, measured, removed."""

import os
from pathlib import Path

import pytest

from jobworker.errors import Busy, NotFound, OutputError
from jobworker.jobs.history.job_note import make_note
from jobworker.jobs.output.ended import describe_output, remove_output, seal_output
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.index import RECORD
from jobworker.jobs.output.spool import Spool

from ...strategies import record
from .written_logs import (
    ERR,
    MERGED,
    OUT,
    PIECES,
    append,
    everything,
    joined,
    no_descriptor_leaks,
    read_all,
    tree_of,
    written,
)

__all__ = ["no_descriptor_leaks"]


@pytest.mark.parametrize(
    ("sizes", "there", "missing"),
    [
        ({}, (b"out one out two ", b"err one err two "), ""),
        ({"stdout": 5}, (b"out o", b"err one err two "), "11 of 16 bytes of stdout"),
        ({"stderr": 0}, (b"out one out two ", b""), "16 of 16 bytes of stderr"),
        ({"index": 0}, (b"out one out two ", b"err one err two "), ""),
        ({"index": RECORD.size + 3}, (b"out one out two ", b"err one err two "), ""),
        ({"index": None}, (b"out one out two ", b"err one err two "), ""),
        ({"stdout": None}, (b"", b"err one err two "), "16 of 16 bytes of stdout"),
        (
            {"stdout": 0, "stderr": 0, "index": 0},
            (b"", b""),
            "16 of 16 bytes of stdout and 16 of 16 bytes of stderr",
        ),
    ],
)
async def test_what_there_is_of_an_ended_log_is_read_and_what_is_missing_told(
    tmp_path: Path, sizes: dict[str, int | None], there: tuple[bytes, bytes], missing: str
) -> None:
    directory = tmp_path / "job"
    files = OutputFiles.create(directory)
    for words in (b"one ", b"two "):
        append(files, OUT, b"out " + words)
        append(files, ERR, b"err " + words)
    files.seal()
    files.close()
    for name, size in sizes.items():
        if size is None:
            (directory / name).unlink()
        else:
            os.truncate(directory / name, size)
    before = tree_of(directory)
    if None not in sizes.values():
        seal_output(directory)  # as a service does at its start
    spool = Spool.open_ended(directory, {OUT: 16, ERR: 16})
    with spool.follow() as follower:
        chunks = await everything(follower)
        assert (joined(chunks, OUT), joined(chunks, ERR)) == there
        if missing:
            with pytest.raises(OutputError, match=missing):
                follower.check_whole()
        else:
            follower.check_whole()
    spool.close()
    if missing:
        assert tree_of(directory) == before


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The directory of a log that is not sealed."""
    with written(tmp_path / "7"):
        pass
    return tmp_path / "7"


def is_sealed(directory: Path) -> bool:
    files = OutputFiles.look_at(directory)
    files.close()
    return files.sealed


def test_log_is_sealed_late_and_once(job: Path) -> None:
    seal_output(job)
    assert is_sealed(job)
    before = tree_of(job)
    seal_output(job)
    assert tree_of(job) == before


def test_log_that_has_become_shorter_is_left_as_it_is(job: Path) -> None:
    os.truncate(job / "stdout", 1)
    before = tree_of(job)
    seal_output(job)
    seal_output(job, ends_now=True)
    assert tree_of(job) == before


@pytest.mark.parametrize("ends_now", [False, True])
def test_empty_log_is_sealed_only_by_the_end_itself(tmp_path: Path, ends_now: bool) -> None:
    """Later an administrator may put the bytes back."""
    OutputFiles.create(tmp_path / "7").close()
    seal_output(tmp_path / "7", ends_now=ends_now)
    assert is_sealed(tmp_path / "7") is ends_now


def test_live_log_is_neither_measured_nor_removed_unless_the_job_is_known_to_have_ended(
    job: Path,
) -> None:
    for refused in (describe_output, remove_output):
        with pytest.raises(Busy, match="it has not ended"):
            refused(job)
    size = sum(each.stat().st_size for each in job.iterdir())
    assert describe_output(job, ended=True) == (len(PIECES), size)
    assert remove_output(job, ended=True) == size
    assert not job.exists()


def test_sealed_log_is_measured_by_its_seal_and_removed(job: Path) -> None:
    seal_output(job)
    files = OutputFiles.look_at(job)
    files.close()
    ended_ns, size = describe_output(job)
    assert (ended_ns, size) == (files.last.time_ns, len(MERGED) + (len(PIECES) + 1) * RECORD.size)
    assert remove_output(job) == size
    with pytest.raises(NotFound):
        describe_output(job)
    with pytest.raises(NotFound):
        remove_output(job)


def test_sealed_log_that_is_being_read_is_removed_by_force_alone(job: Path) -> None:
    seal_output(job)
    reader = OutputFiles.open(job)
    with pytest.raises(Busy, match="it is being read"):
        remove_output(job)
    assert remove_output(job, force=True) > 0
    assert joined(read_all(reader)) == MERGED, "open files can be read to their ends"
    reader.close()


@pytest.mark.parametrize("has_note", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_part_of_a_log_is_one_beside_a_note_if_the_job_has_ended(
    job: Path, has_note: bool, ended: bool
) -> None:
    """A removal was interrupted; without a note the files may be somebody else's."""
    if has_note:
        make_note(job.parent, record(7))
    (job / "index").unlink()
    if has_note and ended:
        assert describe_output(job, ended=True)[1] == len(MERGED)
        assert remove_output(job, ended=True) == len(MERGED)
        assert not job.exists()
        return
    for refused in (describe_output, remove_output):
        with pytest.raises(NotFound):
            refused(job, ended=ended)
    assert (job / "stdout").exists()
