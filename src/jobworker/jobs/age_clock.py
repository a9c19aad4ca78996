"""The clock for the age of output: it goes by the time since boot and doubts the time of day.

The host's time of day may be wrong for seconds or hours (a dead battery, a mistaken `date -s`, a
guest that was resumed). If retention deleted output by a wrong time, the output would be lost. So
this clock compares the time of day with its own earlier time plus the time since boot
(CLOCK_BOOTTIME), which no program can set. If the two disagree by more than TOLERANCE_NS, the clock
goes on by the time since boot. Once they have disagreed by the same amount for PATIENCE_NS, it
follows the time of day. A host that was off for a month looks the same as a host with a wrong clock
after its boot, so retention waits there too. `now_ns` is never later than the time of day, so a
time of day that was set back deletes nothing either.

A file holds the clock's time from one service to the next. Without the file, the clock begins with
the time of the newest record.
"""

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from attrs import Factory, define

from jobworker.regular_file import open_regular

log = logging.getLogger("jobworker.jobs")

SECOND = 1_000_000_000
TOLERANCE_NS = 60 * SECOND
"""The largest difference that does not count as a disagreement: NTP adjusts clocks slowly."""
PATIENCE_NS = 24 * 3600 * SECOND
KEEP_NS = 600 * SECOND
"""How often the file is written. With the time since boot, an older time in it is as good."""
FILE = "clock"
MAX_BYTES = 4096
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def boot_ns() -> int:
    """The time since boot in nanoseconds, including suspension: clock_gettime(2)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """A text that differs for each boot of the host: random(4)."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().decode().strip()


@define(eq=False)
class AgeClock:
    """The clock, described by this module. Its methods block; one thread at a time may call them.

    Times are in nanoseconds, since the epoch or since boot.
    """

    _path: Path
    _keeps: bool = True
    """Whether to write the file. Only the service does; `worker prune` reads it."""
    _wall_ns: Callable[[], int] = time.time_ns
    _boot_ns: Callable[[], int] = boot_ns
    _boot_id: str = Factory(boot_id)
    _shown_ns: int = 0
    """The time, since the epoch, that this clock had at `_at_ns`; 0 before `begin`."""
    _at_ns: int = 0
    """The time since boot at which the clock was read last."""
    _differs_ns: int = 0
    """How far the time of day was ahead of this clock when it began to disagree."""
    _since_ns: int | None = None
    """The time since boot at which it began to disagree; None while both agree."""
    _kept: tuple[int, int | None] | None = None
    """The time since boot at which the file was written, and the `_since_ns` in it."""

    def begin(self, newest_ns: int) -> None:
        """Begin with the time in the file, or else with the time of the newest record.

        `newest_ns` is 0 if there are no records: then the clock begins with the time of day, as
        there is nothing to delete too early.
        """
        self._at_ns = self._boot_ns()
        self._shown_ns = newest_ns or self._wall_ns()
        with suppress(OSError, ValueError, KeyError, TypeError):
            with open(open_regular(self._path, os.O_RDONLY), "rb") as file:
                kept = json.loads(file.read(MAX_BYTES))
            shown, same_boot = int(kept["shown_ns"]), kept["boot_id"] == self._boot_id
            at = int(kept["at_ns"]) if same_boot else 0
            if not 0 <= at <= self._at_ns:
                return
            self._shown_ns, self._at_ns = shown, at
            if same_boot and kept["since_ns"] is not None:
                self._since_ns = int(kept["since_ns"])
                self._differs_ns = int(kept["differs_ns"])

    def now_ns(self) -> int:
        """The time for the age of output, in ns since the epoch; not later than the time of day."""
        return min(self.steady_ns(), self._wall_ns())

    def steady_ns(self) -> int:
        """This clock's time in ns since the epoch, also if the time of day was set back."""
        wall, boot = self._wall_ns(), self._boot_ns()
        shown = self._shown_ns + boot - self._at_ns
        differs = wall - shown
        if abs(differs) <= TOLERANCE_NS:
            shown, self._since_ns = wall, None
        elif self._since_ns is None or abs(differs - self._differs_ns) > TOLERANCE_NS:
            self._since_ns, self._differs_ns = boot, differs
        elif boot - self._since_ns >= PATIENCE_NS:
            shown, self._since_ns = wall, None
        self._shown_ns, self._at_ns = shown, boot
        self._keep()
        return shown

    def _keep(self) -> None:
        if not self._keeps:
            return
        if self._kept is not None:
            when, since = self._kept
            if since == self._since_ns and self._at_ns - when < KEEP_NS:
                return
        self._kept = self._at_ns, self._since_ns
        text = json.dumps(
            {
                "boot_id": self._boot_id,
                "at_ns": self._at_ns,
                "shown_ns": self._shown_ns,
                "since_ns": self._since_ns,
                "differs_ns": self._differs_ns,
            }
        )
        try:
            draft = self._path.with_name(f"{self._path.name}.new")
            draft.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with open(os.open(draft, flags, 0o600), "wb") as file:
                file.write(text.encode())
            draft.replace(self._path)
        except OSError as error:  # the file keeps an earlier time, which is good enough
            if error.errno not in _NO_ROOM:
                what = "cannot write the clock for the age of output to %s: %s; check that file"
                log.warning(what, self._path, error.strerror)
