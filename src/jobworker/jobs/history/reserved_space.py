"""Disk space that the history reserves, so that it can record a job's end while the disk is full.

The space is in the history's own files, where no other program can take it. It has two parts: free
pages inside the database, which SQLite uses before it lets the file grow, and a write-ahead log
that keeps its blocks from one use to the next. So a commit overwrites blocks that the log has, and
a checkpoint overwrites pages that the file has. To make both parts, the history writes pages of
zeros, which go through the log into the file, and frees the pages again.

New records (a start, an audit row) may use half of the free pages at most. Then they are refused
until the space is whole again. The other half is for the ends and changes of jobs that exist: each
takes a page or two at most.

The space outlives the service: the free pages belong to the database, and the log keeps its blocks
when the service stops (`history.files`). So a service that starts on a full disk can record ends
too.

This holds on a file system that overwrites in place (ext4, XFS). A file system that copies on write
(btrfs, ZFS) may still refuse the record of an end. Then the job keeps its place in the quota and
its output until the disk takes the record. The service warns the administrator of such a file
system (`server.host.copy_on_write`).
"""

import errno
import os
from pathlib import Path

import apsw
from attrs import define

PAGES = 512
"""The number of free pages in a whole reserve: 2 MB, and the log has as much again."""
SPARE_FACTOR = 4
"""The reserve is made only if the disk has this many times its size free: making it must not fill
the disk."""


@define(eq=False)
class ReservedSpace:
    """The reserved space of the history at `path`."""

    _path: Path

    def ensure(self, connection: apsw.Connection) -> bool:
        """Fill the reserve if less than half of it is left and the disk has enough space.

        Returns whether at least half of it is there now. Call it outside of a transaction. Raises
        apsw.Error for any fault but a full disk: BusyError, for instance, if another program has
        locked the database, which says nothing of the reserve.
        """
        if self._is_enough(connection):
            return True
        if not self._disk_has_enough(connection):
            return False
        try:
            self._make(connection)
        except apsw.Error as error:
            full = _is_full(connection, error)  # another program may just have filled it
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if not full:
                raise
            return False
        return self._is_enough(connection)

    def _is_enough(self, connection: apsw.Connection) -> bool:
        free = int(str(connection.pragma("freelist_count")))
        return free >= PAGES // 2 and self._log_blocks() >= self._bytes(connection)

    def _log_blocks(self) -> int:
        try:
            return os.stat(f"{self._path}-wal").st_blocks * 512
        except FileNotFoundError:
            return 0

    def _disk_has_enough(self, connection: apsw.Connection) -> bool:
        status = os.statvfs(self._path.parent)
        return status.f_bavail * status.f_frsize >= SPARE_FACTOR * self._bytes(connection)

    def _bytes(self, connection: apsw.Connection) -> int:
        return PAGES * int(str(connection.pragma("page_size")))

    def _make(self, connection: apsw.Connection) -> None:
        # A service that was killed here has left the table with its pages: dropping frees them.
        connection.execute("BEGIN IMMEDIATE; DROP TABLE IF EXISTS room")
        connection.execute("CREATE TABLE room (filler BLOB NOT NULL)")
        connection.execute("INSERT INTO room VALUES (zeroblob(?))", (self._bytes(connection),))
        connection.execute("COMMIT")
        connection.wal_checkpoint()  # without it the pages would have no blocks in the file
        connection.execute("DROP TABLE room")


def _is_full(connection: apsw.Connection, error: apsw.Error) -> bool:
    """Whether `error` says that the disk, or the service's quota of it, is full.

    To be called at once after the error: the connection keeps the errno of its last one only.
    """
    no_room = connection.system_errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, apsw.FullError) or (isinstance(error, apsw.IOError) and no_room)


def make_log_start_anew(connection: apsw.Connection) -> None:
    """Have the next write overwrite the write-ahead log from its beginning. Raises apsw.Error.

    Waits for readers of the log, up to the connection's busy time-out. See
    https://www.sqlite.org/c3ref/wal_checkpoint_v2.html, SQLITE_CHECKPOINT_RESTART.
    """
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
