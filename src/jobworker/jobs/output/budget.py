"""The budget of disk space for the output of all jobs together.

Each write has to respect two bounds: on the bytes of all output together, and on the space that
must stay free on the file system for everything else (the history, the start of other jobs). This
space also includes the bytes that live jobs' disks may still take, as far as the launcher tells
(`promise`). A pump reserves space before a write, and releases what the write did not use. So
pumps in several threads never exceed a bound together. The budget counts the output of live and of
ended jobs apart: retention moves a job's bytes from one to the other (`keep`).
"""

import os
import threading
from pathlib import Path

from attrs import define, field

from jobworker.errors import OutputError
from jobworker.model.job import OutputCut
from jobworker.model.units import format_size


@define(eq=False)
class OutputBudget:
    """The bytes in use and the two bounds. A bound of 0 is none. Safe to use from any thread."""

    _directory: Path
    max_bytes: int = 0
    keep_free_bytes: int = 0
    live_bytes: int = field(default=0, init=False)
    """The bytes of live jobs' output, with what is reserved for writes."""
    kept_bytes: int = field(default=0, init=False)
    """The bytes of ended jobs' output."""
    _promised: tuple[int, int, int] = field(default=(0, 0, 0), init=False)
    """At the last call of `promise`: the bytes that live jobs' disks might still take, the free
    bytes of the file system, and `used_bytes`."""
    _lock: threading.Lock = field(factory=threading.Lock, init=False)

    @property
    def used_bytes(self) -> int:
        """The bytes of all output together, which `max_bytes` bounds."""
        return self.live_bytes + self.kept_bytes

    def reserve(self, wanted: int) -> int:
        """Reserve up to `wanted` bytes (at least 1). Returns how many are reserved, at least 1.

        Raises OutputError if there is no space; its `data["cut"]` names the bound. Calls
        statvfs(3), so call it in a thread.
        """
        room = wanted
        if self.keep_free_bytes:
            room = min(room, self._free_bytes())
        with self._lock:
            if self.max_bytes and self.max_bytes - self.used_bytes < room:
                room = self.max_bytes - self.used_bytes
                if room <= 0:
                    raise OutputError(
                        "cannot keep more output: all jobs together have "
                        f"{format_size(self.max_bytes)}, the limit",
                        remedy="prune old output, or raise worker.max_total_output",
                        data={"cut": OutputCut.TOTAL.value},
                    )
            if room <= 0:
                raise OutputError(
                    "cannot keep more output: less than "
                    f"{format_size(self.keep_free_bytes)} are free where output is kept, "
                    "beside what live jobs' disks may still take",
                    remedy="make room there, or lower worker.keep_free",
                    data={"cut": OutputCut.DISK.value},
                )
            self.live_bytes += room
        return room

    def promise(self, count: int) -> None:
        """Record how many bytes live jobs' disks may still take on the file system.

        Calls statvfs(3), so call it in a thread. Raises OutputError if that fails.
        """
        self._promised = (count, self._disk_bytes(), self.used_bytes)

    def release(self, count: int) -> None:
        """Return `count` bytes that were reserved and not written."""
        with self._lock:
            self.live_bytes = max(0, self.live_bytes - count)

    def count(self, count: int) -> None:
        """Count `count` bytes of a live job that are on the disk already."""
        with self._lock:
            self.live_bytes += count

    def keep(self, count: int, was_live: int) -> None:
        """Count `count` bytes more for ended jobs, and `was_live` bytes less for live jobs.

        `count` is negative if output was removed.
        """
        with self._lock:
            self.kept_bytes += count
            self.live_bytes -= was_live

    def _free_bytes(self) -> int:
        free = self._disk_bytes()
        promised, free_then, used_then = self._promised
        # Free space that has gone since then, but not to output, may have gone to the disks. It is
        # subtracted from the promise, or it would count twice and cut output without need.
        gone = free_then - free - (self.used_bytes - used_then)
        promised = max(0, promised - max(0, gone))
        return free - promised - self.keep_free_bytes

    def _disk_bytes(self) -> int:
        try:
            status = os.statvfs(self._directory)
        except OSError as error:
            raise OutputError(
                f"cannot keep output in {self._directory}: {error.strerror}",
                remedy="check the disk that holds worker.state_dir",
            ) from error
        return status.f_bavail * status.f_frsize
