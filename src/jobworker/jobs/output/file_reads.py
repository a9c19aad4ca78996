"""Reads bytes of an open file: from the page cache alone, so without waiting, or from the disk."""

import errno
import os

from attrs import define, field

from jobworker.errors import OutputError


@define(eq=False)
class FileReads:
    """Reads of files on one file system."""

    _can_read_cache_only: bool = field(default=True, init=False)
    """Whether the file system supports RWF_NOWAIT of preadv(2)."""

    def read(self, fd: int, size: int, offset: int, *, nowait: bool) -> bytes | bytearray:
        """Read all `size` bytes, or with `nowait` at least one of them, from the page cache alone.

        Raises BlockingIOError if the page cache does not have them, OutputError if the file is too
        short, and OSError.
        """
        if not nowait:
            data = os.pread(fd, size, offset)
            if len(data) < size:
                raise OutputError("cannot read the job's output: a file is shorter than its index")
            return data
        if not self._can_read_cache_only:
            raise BlockingIOError
        buffer = bytearray(size)
        try:
            count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # tmpfs, among others
                self._can_read_cache_only = False
                raise BlockingIOError from None
            raise
        if not count:
            raise BlockingIOError  # the file has become shorter: the read in a thread reports it
        del buffer[count:]
        return buffer
