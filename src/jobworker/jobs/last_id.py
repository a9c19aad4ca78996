"""The last id that was given to a job, beside the history and for the case that it is gone.

The history knows the last id too, but an older copy of it, or a new one, knows less; and an id that
was told to a client must never mean another job. The number is written in place, so that a full
disk refuses nothing, and without fsync: after a power cut the history alone counts.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

from attrs import Factory, define

_DIGITS = 16
"""Enough for 2^53, beyond which JSON's numbers are not exact."""
MAX_ID = 1 << 53


@define(eq=False)
class LastId:
    """A file with one number; without a file nothing is kept."""

    _file: int | None
    _lock: threading.Lock = Factory(threading.Lock)
    _kept: int = 0

    @classmethod
    def open(cls, path: Path) -> "LastId":
        """Open or make the file at `path`."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return cls(os.open(path, flags, 0o600))
        except OSError:
            return cls(None)

    def read(self) -> int:
        """The number; 0 where there is none."""
        if self._file is None:
            return 0
        with suppress(OSError, ValueError):
            number = int(os.pread(self._file, _DIGITS + 1, 0))
            return number if 0 <= number < MAX_ID else 0
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
