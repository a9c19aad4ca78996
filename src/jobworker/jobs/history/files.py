"""The history's write-ahead log and its index, kept with their blocks from one service to the next.

A service that starts on a full disk gets no new blocks. If ext4 reserves blocks for root (mkfs
does, 5 %), an ordinary user does not even get the blocks back that it has just freed. SQLite frees
the blocks of both files: it deletes the log and the index (`-shm`) when the last connection closes,
and the first connection truncates an index that a killed process left, before it makes a new one.
So:

- A clean stop keeps the log's file (SQLITE_FCNTL_PERSIST_WAL), but empties the log: otherwise
  SQLite would apply it to an older copy of the database that an administrator puts back. Once the
  database has all of the log, this module overwrites the log's header with zeros. SQLite takes such
  a log for an empty one.
- SQLite truncates the index unless another connection uses it, which shows by a shared lock on byte
  128. While SQLite makes the first connection, this module holds such a lock: fcntl(2) counts an
  OFD lock as another process's. Before that it fills the index with zeros, so SQLite finds the
  same as after its own truncation. The descriptor stays open as long as SQLite uses the file:
  closing any descriptor of a file drops all POSIX locks that the process has on it.

If this is not possible, for instance since another program has the database open, SQLite does what
it always does. Then a start needs some blocks, and fails with an error that names the disk if there
are none.
"""

import fcntl
import os
import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import apsw
from attrs import define, field

_HEADER_BYTES = 32
"""The size of a log's header: https://www.sqlite.org/fileformat2.html#the_write_ahead_log."""
_LOCK_BYTE = 128
"""The byte of the index on which each process that uses it has a shared lock: UNIX_SHM_DMS in
SQLite's os_unix.c."""
_FLOCK = "hhqqi4x"
"""struct flock of fcntl(2)."""
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


@define(eq=False)
class HistoryFiles:
    """The log and the index of the history at `path`. One service at a time uses them."""

    _path: Path
    _index: int | None = field(default=None, init=False)

    @property
    def log(self) -> Path:
        """The path of the write-ahead log."""
        return self._path.with_name(f"{self._path.name}-wal")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Have SQLite keep the index's blocks. The caller makes the first connection in the block.

        Raises nothing: where the index cannot be kept, SQLite truncates it.
        """
        with suppress(OSError):
            self._index = self._open_index()
            _lock(self._index, fcntl.F_WRLCK)  # raises if another process uses the index
            lock = fcntl.F_UNLCK
            try:
                status = os.fstat(self._index)
                if status.st_blocks * 512 >= status.st_size:
                    os.pwrite(self._index, bytes(status.st_size), 0)
                    lock = fcntl.F_RDLCK
            finally:
                _lock(self._index, lock)
        try:
            yield
        finally:
            if self._index is not None:
                _lock(self._index, fcntl.F_UNLCK)

    def close(self, connection: apsw.Connection) -> None:
        """Close the writer's connection, the last of this process. Keep the log's file, emptied.

        Blocks for the disk. Raises nothing.
        """
        header = b""
        with suppress(apsw.Error, OSError):
            keeps = array("i", [1])
            connection.file_control("main", apsw.SQLITE_FCNTL_PERSIST_WAL, keeps.buffer_info()[0])
            in_log, in_file = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_FULL)
            if in_log == in_file:
                header = self._header()
        connection.close()
        self.release()
        with suppress(OSError):
            if header:
                self._empty_log(header)

    def leave(self, connection: apsw.Connection) -> None:
        """Close a connection to a database that cannot be used. File and log stay as they are.

        By itself SQLite would write the log into the file and delete the log. Raises nothing.
        """
        with suppress(apsw.Error):
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.close()

    def release(self) -> None:
        """Close the index. Call it after the last connection of this process is closed."""
        if self._index is not None:
            os.close(self._index)
            self._index = None

    def log_is_empty(self) -> bool:
        """Whether the log's header is all zeros, or has no bytes. Raises OSError."""
        return not any(self._header())

    def _empty_log(self, header: bytes) -> None:
        """Overwrite the log's header with zeros. Raises OSError if another program uses the log.

        Does nothing if the header is no longer `header`: then another program has written to it.
        """
        index = self._open_index()
        try:
            _lock(index, fcntl.F_WRLCK)
            if self._header() == header:
                log = os.open(self.log, _FLAGS)
                try:
                    os.pwrite(log, bytes(len(header)), 0)
                    os.fsync(log)
                finally:
                    os.close(log)
        finally:
            os.close(index)

    def _header(self) -> bytes:
        log = os.open(self.log, _FLAGS)
        try:
            return os.pread(log, _HEADER_BYTES, 0)
        finally:
            os.close(log)

    def _open_index(self) -> int:
        return os.open(self._path.with_name(f"{self._path.name}-shm"), _FLAGS)


def _lock(file: int, kind: int) -> None:
    """Set or drop this descriptor's lock on the byte; `kind` is F_RDLCK, F_WRLCK or F_UNLCK.

    An OFD lock (fcntl(2)). Raises OSError if another descriptor has a lock that conflicts.
    """
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, _LOCK_BYTE, 1, 0))
