"""The space that the history reserves for the ends of jobs."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import apsw
import pytest

from jobworker.errors import InternalError
from jobworker.jobs.history import writer as history_writer
from jobworker.jobs.history.reserved_space import (
    PAGES,
    SPARE_FACTOR,
    ReservedSpace,
    make_log_start_anew,
)

from ...strategies import record
from .histories import file_size_limit, opened, path, write_lock

__all__ = ["path"]


async def test_lock_of_another_is_not_told_as_a_full_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the room for ends has to be made anew, which needs the lock too."""
    monkeypatch.setattr(history_writer, "BUSY_SECONDS", 0.05)
    with opened(path) as history:
        with write_lock(path) as other:
            other.execute("COMMIT")
            other.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(InternalError, match="another program has locked it"):
                await history.put(record(history.take_id()), is_new=True)
        await history.put(record(history.take_id()), is_new=True)


def test_only_a_full_disk_counts_as_one(path: Path) -> None:
    with opened(path):
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        with closing(connection), pytest.raises(apsw.ReadOnlyError):
            ReservedSpace(path.with_name("other")).ensure(connection)  # whose log has no room


@pytest.fixture
def connection(path: Path) -> Iterator[apsw.Connection]:
    """A database in WAL mode with a table to fill."""
    with closing(apsw.Connection(str(path))) as connection:
        connection.pragma("journal_mode", "wal")
        connection.execute("CREATE TABLE filled (data BLOB)")
        yield connection


@pytest.fixture
def space(path: Path) -> ReservedSpace:
    return ReservedSpace(path)


def free_pages(connection: apsw.Connection) -> int:
    return int(str(connection.pragma("freelist_count")))


def use(connection: apsw.Connection, pages: int) -> None:
    size = int(str(connection.pragma("page_size")))
    connection.execute("INSERT INTO filled VALUES (zeroblob(?))", (pages * size,))


def test_reserve_is_made_of_free_pages_and_of_a_log_with_blocks(
    path: Path, connection: apsw.Connection, space: ReservedSpace
) -> None:
    assert space.ensure(connection)
    size = PAGES * int(str(connection.pragma("page_size")))
    assert free_pages(connection) >= PAGES
    assert path.with_name("history.db-wal").stat().st_blocks * 512 >= size
    assert path.stat().st_blocks * 512 >= size, "a hole would need blocks later"
    assert not connection.in_transaction
    assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'room'").get == 0


def test_reserve_is_made_again_once_less_than_half_is_left(
    connection: apsw.Connection, space: ReservedSpace
) -> None:
    assert space.ensure(connection)
    use(connection, PAGES // 2 - 10)
    before = free_pages(connection)
    assert PAGES // 2 <= before < PAGES
    assert space.ensure(connection)
    assert free_pages(connection) == before, "there is enough"
    use(connection, PAGES // 4)
    assert free_pages(connection) < PAGES // 2
    assert space.ensure(connection)
    assert free_pages(connection) >= PAGES


def test_log_that_was_cut_off_is_no_reserve(
    path: Path, connection: apsw.Connection, space: ReservedSpace
) -> None:
    assert space.ensure(connection)
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    assert path.with_name("history.db-wal").stat().st_size == 0
    assert space.ensure(connection)
    assert path.with_name("history.db-wal").stat().st_size > 0


@pytest.mark.parametrize("lacks", [True, False])
def test_reserve_is_not_made_where_it_would_fill_the_disk(
    connection: apsw.Connection,
    space: ReservedSpace,
    monkeypatch: pytest.MonkeyPatch,
    lacks: bool,
) -> None:
    needed = SPARE_FACTOR * PAGES * int(str(connection.pragma("page_size")))
    free = SimpleNamespace(f_bavail=needed - lacks, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    assert space.ensure(connection) is not lacks
    assert (free_pages(connection) < PAGES) is lacks
    if not lacks:
        free.f_bavail = 0
        assert space.ensure(connection), "it is there already"


@pytest.mark.parametrize("kibibytes", [4, 64, 600, 2000])
def test_disk_that_fills_meanwhile_is_told_and_leaves_nothing_under_way(
    path: Path, connection: apsw.Connection, space: ReservedSpace, kibibytes: int
) -> None:
    with file_size_limit(kibibytes << 10):
        assert not space.ensure(connection)
    assert not connection.in_transaction
    assert space.ensure(connection)


def test_pages_of_a_service_that_was_killed_amid_it_are_free_again(
    connection: apsw.Connection, space: ReservedSpace
) -> None:
    connection.execute("CREATE TABLE room (filler BLOB NOT NULL)")
    connection.execute("INSERT INTO room VALUES (zeroblob(3000000))")
    assert space.ensure(connection)
    assert free_pages(connection) >= 3_000_000 // 4096


def test_log_starts_anew_after_all_of_it_is_in_the_file(
    path: Path, connection: apsw.Connection
) -> None:
    log = path.with_name("history.db-wal")
    for _ in range(3):
        use(connection, 10)
    size = log.stat().st_size
    make_log_start_anew(connection)
    for _ in range(2):
        use(connection, 10)
    assert log.stat().st_size == size, "its blocks are used again"


def test_fault_amid_it_is_raised_and_leaves_no_transaction(
    connection: apsw.Connection, space: ReservedSpace
) -> None:
    connection.execute("CREATE VIEW room AS SELECT 1")  # cannot be dropped as a table
    with pytest.raises(apsw.SQLError, match="DROP VIEW"):
        space.ensure(connection)
    assert not connection.in_transaction


def test_database_that_may_not_grow_is_told_as_a_full_disk(
    connection: apsw.Connection, space: ReservedSpace
) -> None:
    connection.pragma("max_page_count", PAGES // 2)
    assert not space.ensure(connection)
    assert not connection.in_transaction
