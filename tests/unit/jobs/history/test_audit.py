"""The audit log's file holds whole lines, whatever the disk did."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobworker.jobs.history.audit import FILE, AuditRow, append_lines


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE


def rows(*jobs: int, detail: str = "") -> list[AuditRow]:
    at = datetime(2026, 1, 31, tzinfo=UTC)
    return [AuditRow(at=at, action="x", job=n, outcome="ok", detail=detail) for n in jobs]


def jobs_in(path: Path) -> list[int]:
    """The jobs of all lines, each of which must be JSON."""
    content = path.read_text()
    assert content == "" or content.endswith("\n")
    return [json.loads(line)["job"] for line in content.splitlines()]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """A disk that takes a part of a write and refuses the rest (EFBIG, setrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [1, 150, 299, 301, 450, 1000])
def test_full_disk_leaves_whole_lines_and_the_next_begin_anew(path: Path, room: int) -> None:
    append_lines(path, rows(0))
    with room_for(path.stat().st_size + room), pytest.raises(OSError, match="File too large"):
        append_lines(path, rows(1, 2, 3, 4, detail="x" * 200))
    kept = jobs_in(path)
    assert kept == list(range(len(kept)))
    append_lines(path, rows(9))
    assert jobs_in(path) == [*kept, 9]


@pytest.mark.parametrize("half", [b'{"at": "2026', b"{", b'{"detail": "' + b"x" * 20_000])
@pytest.mark.parametrize("before", [[], [1, 2]])
def test_half_line_of_a_service_that_was_killed_is_cut(
    path: Path, half: bytes, before: list[int]
) -> None:
    append_lines(path, rows(*before))
    with path.open("ab") as file:
        file.write(half)
    append_lines(path, rows(7))
    assert jobs_in(path) == [*before, 7]


def test_link_in_place_of_the_file_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        append_lines(path, rows(1))
    assert not (tmp_path / "elsewhere").exists()
