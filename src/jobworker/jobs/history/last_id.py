"""The last id that was given to a job, in a file beside the history in case the history is lost.

The history keeps the last id too. But an older copy of it, or a new one, has a lower number, and an
id that a client knows must never mean another job. The file is overwritten in place, so a full disk
does not refuse the write. It is written without fsync(2): after a power cut only the history is
sure.
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
    """A file that holds one number. If the file cannot be opened, nothing is stored."""

    _path: Path
    _file: int | None
    _lock: threading.Lock = Factory(threading.Lock)
    _kept: int = 0

    @classmethod
    def open(cls, path: Path) -> "LastId":
        """Open the file at `path`, or make it. Raises nothing: a failure goes to the log."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        try:
            return cls(path, open_regular(path, flags))
        except OSError as error:
            log.warning("cannot open %s: %s; only the history keeps ids", path, error.strerror)
            return cls(path, None)

    def read(self) -> int:
        """The number in the file; 0 if there is none that is an id."""
        if self._file is None:
            return 0
        with suppress(OSError, ValueError):
            number = int(os.pread(self._file, _DIGITS + 1, 0))
            if 0 <= number <= MAX_JOB:
                return number
            log.warning("%s holds %d, which is no job's id; it is ignored", self._path, number)
        return 0

    def write(self, number: int) -> None:
        """Store this number, unless a higher one was stored. Raises nothing.

        Blocks for the disk. May be called from any thread.
        """
        with self._lock:
            if self._file is None or number <= self._kept:
                return
            self._kept = number
            with suppress(OSError):
                os.pwrite(self._file, f"{number:0{_DIGITS}}\n".encode(), 0)

    def close(self) -> None:
        """Close the file; later calls do nothing."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
