"""The space that the history reserves for the ends of jobs."""

from contextlib import closing
from pathlib import Path

import apsw
import pytest

from jobworker.errors import InternalError
from jobworker.jobs.history import writer as history_writer
from jobworker.jobs.history.reserved_space import ReservedSpace

from ...strategies import record
from .histories import opened, path, write_lock

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
