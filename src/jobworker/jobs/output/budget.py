"""What all jobs' output may take of the disk, shared among those who write.

Two bounds, both looked at before each write: the bytes of all output together, and the room that
must stay free on its file system for everything else (the history, the start of other jobs). What
live jobs' disks may still take there belongs to that, as far as anybody tells (`promise`). Room is
taken before a write and what was not used is given back, so writers in several threads never go
over together what each of them may. What live jobs have taken is what ended jobs have from then on
(`keep`): retention tells of each change of that.
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
    """Bytes taken, and the bounds; 0 is no bound."""

    _directory: Path
    max_bytes: int = 0
    keep_free_bytes: int = 0
    live_bytes: int = field(default=0, init=False)
    """What live jobs have taken."""
    kept_bytes: int = field(default=0, init=False)
    """What ended jobs have."""
    _promised: tuple[int, int, int] = field(default=(0, 0, 0), init=False)
    """What disks might still take when that was told last, and what was free and used then."""
    _lock: threading.Lock = field(factory=threading.Lock, init=False)

    @property
    def used_bytes(self) -> int:
        """What all output takes of the bound."""
        return self.live_bytes + self.kept_bytes

    def reserve(self, wanted: int) -> int:
        """Take room for up to `wanted` bytes (at least 1): how many, never none.

        Raises OutputError where there is no room; `data["cut"]` says for what reason. It asks the
        file system: call it in a thread.
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
        """Note what live jobs' disks may still take. It asks the file system, as `reserve` does."""
        self._promised = (count, self._disk_bytes(), self.used_bytes)

    def release(self, count: int) -> None:
        """Give back what was taken and not written."""
        with self._lock:
            self.live_bytes = max(0, self.live_bytes - count)

    def count(self, count: int) -> None:
        """Count what a live job has on the disk already."""
        with self._lock:
            self.live_bytes += count

    def keep(self, count: int, was_live: int) -> None:
        """Count `count` bytes more as ended jobs', or fewer, and `was_live` no longer as live."""
        with self._lock:
            self.kept_bytes += count
            self.live_bytes -= was_live

    def _free_bytes(self) -> int:
        free = self._disk_bytes()
        promised, free_then, used_then = self._promised
        # What is gone since then, but for output, may be what the disks have taken: no output is
        # cut for nothing, and none takes their room.
        gone = free_then - free - (self.used_bytes - used_then)
        promised = max(0, promised - max(0, gone))
        return free - promised - self.keep_free_bytes

    def _disk_bytes(self) -> int:
        try:
            status = os.statvfs(self._directory)
        except OSError as error:
            raise OutputError(f"cannot keep output: {error.strerror}") from error
        return status.f_bavail * status.f_frsize
