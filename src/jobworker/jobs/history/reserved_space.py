"""Room that the history has set aside, so that an end can be recorded though the disk is full.

The room is in the history's own files, where nobody else can take it. Free pages inside the
database, which SQLite takes before it lets the file grow, and a write-ahead log that keeps its
blocks from one use to the next: then a commit overwrites what is there, and so does a checkpoint.
Pages of zeros make both: they go through the log into the file, and are freed again.

What is new (a start, an audit row) may use half of the free pages at most, and is refused until
the room is whole again. The rest is for what must be told of jobs that there are already: each
takes a page or two at most.

The room outlives the service: the free pages are the database's, and the log keeps its blocks over
a stop (`history.files`). So a service that is started on a full disk can record ends too.

This holds where a file system overwrites in place (ext4, XFS); one that copies on write (btrfs,
ZFS) may refuse an end still, and then the job keeps what it has until the disk takes its record.
The administrator is told so (`server.host.copy_on_write`).
"""

import errno
import os
from pathlib import Path

import apsw
from attrs import define

PAGES = 512
"""How many free pages there shall be: 2 MB, and as much again in the log."""
SPARE_FACTOR = 4
"""The disk must have so many times that much, or making room would fill it."""


@define(eq=False)
class ReservedSpace:
    """What is set aside in the history at `path`."""

    _path: Path

    def ensure(self, connection: apsw.Connection) -> bool:
        """Make the room whole where half of it is gone and the disk has enough: whether it is.

        Outside of a transaction. Raises apsw.Error where something else is the matter than a full
        disk, as BusyError where another has the database locked: that says nothing of the room.
        """
        if self._is_enough(connection):
            return True
        if not self._disk_has_enough(connection):
            return False
        try:
            self._make(connection)
        except apsw.Error as error:
            full = _is_full(connection, error)  # another was faster to fill the disk
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
        # A table that a killed service has left is full: dropping it gives its pages back.
        connection.execute("BEGIN IMMEDIATE; DROP TABLE IF EXISTS room")
        connection.execute("CREATE TABLE room (filler BLOB NOT NULL)")
        connection.execute("INSERT INTO room VALUES (zeroblob(?))", (self._bytes(connection),))
        connection.execute("COMMIT")
        connection.wal_checkpoint()  # or the pages would have no blocks in the file
        connection.execute("DROP TABLE room")


def _is_full(connection: apsw.Connection, error: apsw.Error) -> bool:
    """Whether the disk, or what a quota gives of it, is what has just refused."""
    no_room = connection.system_errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, apsw.FullError) or (isinstance(error, apsw.IOError) and no_room)


def make_log_start_anew(connection: apsw.Connection) -> None:
    """Have the log be used from its beginning again. Raises apsw.Error.

    Waits for readers, as long as the connection waits for a lock.
    """
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
