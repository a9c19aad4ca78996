"""Log and index of the history stay with their blocks, and an empty log says nothing."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import apsw
import pytest

from jobworker.jobs.history.history import History
from jobworker.model.job import JobId

from ...strategies import record


@contextmanager
def opened(path: Path) -> Iterator[History]:
    history = History.open(path)
    try:
        yield history
    finally:
        history.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


def blocks(path: Path) -> list[int]:
    return [Path(f"{path}{name}").stat().st_blocks for name in ("", "-wal", "-shm")]


async def test_blocks_stay_over_stops_and_starts(path: Path) -> None:
    with opened(path) as history:
        await history.put(record(1))
        before = blocks(path)
    assert min(before) > 0
    for number in (2, 3):
        assert blocks(path) == before
        with opened(path) as history:
            await history.put(record(number))
            assert blocks(path) == before
            assert await history.known([JobId(n) for n in range(9)]) == set(range(1, number + 1))


async def test_log_of_a_clean_stop_changes_no_older_copy(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with opened(path) as history:
        await history.put(record(1))
    shutil.copy(path, copy)
    with opened(path) as history:
        await history.put(record(2))
    shutil.copy(copy, path)
    with opened(path) as history:
        assert await history.known([JobId(1), JobId(2)]) == {1}
        with closing(apsw.Connection(str(path))) as connection:
            assert connection.execute("PRAGMA integrity_check").get == "ok"


async def test_log_that_another_program_uses_stays_as_it_is(path: Path) -> None:
    with closing(apsw.Connection(str(path))) as backup:
        with opened(path) as history:
            await history.put(record(1))
            backup.execute("SELECT count(*) FROM jobs").fetchall()
        assert Path(f"{path}-wal").read_bytes()[:4] != bytes(4)
        assert backup.execute("SELECT count(*) FROM jobs").get == 1
    with opened(path) as history:
        assert await history.known([JobId(1)]) == {1}


async def test_index_that_an_earlier_service_left_is_not_believed(
    path: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    with opened(path) as history:
        await history.put(record(1))
        shutil.copy(f"{path}-shm", killed / "history.db-shm")  # which does not know of the second
        await history.put(record(2))
        for name in ("", "-wal"):
            shutil.copy(f"{path}{name}", killed / f"history.db{name}")
    before = blocks(killed / "history.db")
    with opened(killed / "history.db") as history:
        assert await history.known([JobId(1), JobId(2)]) == {1, 2}
        assert blocks(killed / "history.db") == before


async def test_index_that_takes_no_zeros_is_left_to_sqlite(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file system copies on write, or a quota is used up."""
    with opened(path) as history:
        await history.put(record(1))
        shutil.copy(f"{path}-shm", tmp_path / "killed")
    shutil.copy(tmp_path / "killed", f"{path}-shm")
    refused = list[str]()

    def pwrite(file: int, *_: object) -> int:
        refused.append(os.readlink(f"/proc/self/fd/{file}"))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        history = History.open(path)
    with closing(history):
        assert f"{path}-shm" in refused
        assert await history.known([JobId(1)]) == {1}
