"""The last id that was given to a job, beside the history and for the case that it is gone.

The history knows the last id too, but an older copy of it, or a new one, knows less; and an id that
was told to a client must never mean another job. The number is written in place, so that a full
disk refuses nothing, and without fsync: after a power cut the history alone counts.
"""

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

from attrs import Factory, define

from jobworker.regular_file import open_regular
from jobworker.sandbox.protocol.requests import MAX_JOB

log = logging.getLogger("jobworker.jobs")

_DIGITS = len(str(MAX_JOB))


@define(eq=False)
class LastId:
    """A file with one number; without a file nothing is kept."""

    _path: Path
    _file: int | None
    _lock: threading.Lock = Factory(threading.Lock)
    _kept: int = 0

    @classmethod
    def open(cls, path: Path) -> "LastId":
        """Open or make the file at `path`."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        try:
            return cls(path, open_regular(path, flags))
        except OSError as error:
            log.warning("cannot open %s: %s; only the history keeps ids", path, error.strerror)
            return cls(path, None)

    def read(self) -> int:
        """The number; 0 where there is none."""
        if self._file is None:
            return 0
        with suppress(OSError, ValueError):
            number = int(os.pread(self._file, _DIGITS + 1, 0))
            if 0 <= number <= MAX_JOB:
                return number
            log.warning("%s holds %d, which is no job's id; it is not heeded", self._path, number)
        return 0

    def write(self, number: int) -> None:
        """Keep this number, unless a higher one is kept. Blocks for the disk; from any thread."""
        with self._lock:
            if self._file is None or number <= self._kept:
                return
            self._kept = number
            with suppress(OSError):
                os.pwrite(self._file, f"{number:0{_DIGITS}}\n".encode(), 0)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
