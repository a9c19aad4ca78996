"""The history's write-ahead log and its index, kept with their blocks from one service to the next.

A service that starts on a full disk cannot have new blocks, and where ext4 keeps a reserve for root
(mkfs does, 5 %) an ordinary user cannot even have those that it has just given back. SQLite gives
all of both files back: the log and the index (`-shm`) with the last connection, and what a killed
process left of the index with the first one, which cuts that file before it makes it anew. So:

- A clean stop leaves the log (SQLITE_FCNTL_PERSIST_WAL), but not what it says: a log that stayed
  would be played into an older copy of the database that an administrator puts back. When all of it
  is in the database, its header is overwritten by zeros, which SQLite takes for an empty log.
- SQLite cuts the index unless it sees that another connection has it: a shared lock on byte 128.
  While the first connection is made, this process holds such a lock of its own (an OFD lock counts
  as another's, fcntl(2)), and has filled the index with zeros before, which is what SQLite would
  do. The descriptor stays open as long as SQLite has the file: closing one drops all POSIX locks
  that the process has on that file.

Where that is not possible, such as beside another program that has the database open, SQLite does
as it always does; a start then needs some blocks, and is refused by name if there are none.
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
"""Of a write-ahead log: https://www.sqlite.org/fileformat2.html#the_write_ahead_log."""
_LOCK_BYTE = 128
"""Of the index, locked (shared) by each process that has it: UNIX_SHM_DMS in SQLite's os_unix.c."""
_FLOCK = "hhqqi4x"
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


@define(eq=False)
class HistoryFiles:
    """Log and index of the history at `path`, for its one service."""

    _path: Path
    _index: int | None = field(default=None, init=False)

    @property
    def log(self) -> Path:
        """The write-ahead log."""
        return self._path.with_name(f"{self._path.name}-wal")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Have SQLite take the index as it is: during the block the first connection is made."""
        with suppress(OSError):
            self._index = self._open_index()
            _lock(self._index, fcntl.F_WRLCK)  # or another process uses it
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
        """Close the writer, the last connection of this process, and keep the log without a word.

        Blocks for the disk; raises nothing.
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
        """Close a connection whose database is not to be used: file and log stay as they are.

        SQLite would write the log into the file, and remove it. Raises nothing.
        """
        with suppress(apsw.Error):
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.close()

    def release(self) -> None:
        """Let go of the index: once no connection of this process has it."""
        if self._index is not None:
            os.close(self._index)
            self._index = None

    def log_is_empty(self) -> bool:
        """Whether the log says nothing. Raises OSError."""
        return not any(self._header())

    def _empty_log(self, header: bytes) -> None:
        """Take what the log says, unless another program uses it or has written to it since."""
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
    """Lock the byte for this descriptor, or unlock it. Raises OSError where another has it."""
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, _LOCK_BYTE, 1, 0))
