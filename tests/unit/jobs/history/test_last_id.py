"""The highest id that was given, kept beside the history."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobworker.jobs.history.last_id import LastId
from jobworker.sandbox.protocol.requests import MAX_JOB

from .histories import file_size_limit, opened, path

__all__ = ["path"]


@pytest.mark.parametrize("number", ["9007199254740991", str(MAX_JOB + 1), "9" * 40, "-1"])
def test_number_that_is_no_id_is_not_heeded_and_told(
    path: Path, number: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.with_name("last-id").write_text(f"{number}\n")
    with opened(path) as history:
        assert history.take_id() == 1
    assert "which is no job's id" in caplog.text


def test_highest_id_stays_kept_whichever_thread_comes_last(path: Path) -> None:
    with opened(path) as history:
        first, second = history.take_id(), history.take_id()
        history.keep_id(second)
        history.keep_id(first)
    path.unlink()
    with opened(path) as history:
        assert history.take_id() == 3


@contextmanager
def last_id(file: Path) -> Iterator[LastId]:
    kept = LastId.open(file)
    try:
        yield kept
    finally:
        kept.close()
        kept.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "last-id"


def test_file_that_was_not_there_tells_nothing(file: Path) -> None:
    with last_id(file) as kept:
        assert kept.read() == 0
    assert file.exists()


@pytest.mark.parametrize("number", [1, 12345, MAX_JOB])
def test_number_is_read_as_it_was_written(file: Path, number: int) -> None:
    with last_id(file) as kept:
        kept.write(number)
        assert kept.read() == number
    with last_id(file) as again:
        assert again.read() == number


def test_number_has_the_same_length_always_so_a_full_disk_takes_it(file: Path) -> None:
    with last_id(file) as kept:
        kept.write(9)
        size = file.stat().st_size
        with file_size_limit(size):
            kept.write(10)
            kept.write(MAX_JOB)
        assert (file.stat().st_size, kept.read()) == (size, MAX_JOB)


@pytest.mark.parametrize("text", ["", "x", "-1\n", "-5", f"{MAX_JOB + 1}\n", "\n\n"])
def test_text_that_is_no_id_is_none(file: Path, text: str) -> None:
    file.write_text(text)
    with last_id(file) as kept:
        assert kept.read() == 0
        kept.write(7)
        assert kept.read() == 7


def test_lower_number_does_not_replace_a_higher_one(file: Path) -> None:
    with last_id(file) as kept:
        for number in (3, 9, 4, 9):
            kept.write(number)
        assert kept.read() == 9


def test_disk_that_refuses_is_no_fault(file: Path) -> None:
    with last_id(file) as kept:
        with file_size_limit(0):
            kept.write(5)
        assert kept.read() == 0
        kept.write(6)
        assert kept.read() == 6


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_path_that_is_no_file_keeps_no_ids_and_is_told(
    file: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(file.with_name("elsewhere"))
    with last_id(file) as kept:
        kept.write(7)
        assert kept.read() == 0
    assert f"cannot open {file}" in caplog.text
    assert not file.with_name("elsewhere").exists()


def test_closed_file_takes_nothing(file: Path) -> None:
    with last_id(file) as kept:
        kept.write(7)
    kept.write(8)
    assert (kept.read(), int(file.read_text())) == (0, 7)
