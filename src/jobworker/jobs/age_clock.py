"""The clock by which output is old: it goes by the time since boot, and doubts the time of day.

The time of day may be wrong for seconds or hours (a dead battery, a mistaken `date -s`, a guest
that was resumed), and output that was deleted meanwhile does not come back. So a time of day counts
only with a second witness: what this clock showed before, and the time since boot (CLOCK_BOOTTIME),
which nobody can set. Where the time of day disagrees by more than TOLERANCE, this clock waits until
it has disagreed by the same amount for PATIENCE, and then follows it. A host that was off for a
month looks the same as a wrong clock after its boot: deleting waits there too. The clock never
shows a time later than the time of day, so one that was set back deletes nothing either.

What it showed is kept in a file, since services come and go. Where there is none, the newest record
is the witness.
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
"""What clocks may differ by when they are adjusted slowly."""
PATIENCE_NS = 24 * 3600 * SECOND
KEEP_NS = 600 * SECOND
"""How often the file is written; in between, the time since boot makes up for it."""
FILE = "clock"
MAX_BYTES = 4096
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def boot_ns() -> int:
    """The time since boot, suspension included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """Names this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().decode().strip()


@define(eq=False)
class AgeClock:
    """See the module. `now_ns` waits for the disk: one thread at a time."""

    _path: Path
    _keeps: bool = True
    """Whether to write the file: its one owner does, the service."""
    _wall_ns: Callable[[], int] = time.time_ns
    _boot_ns: Callable[[], int] = boot_ns
    _boot_id: str = Factory(boot_id)
    _shown_ns: int = 0
    """What this clock showed at `_at_ns` since boot; 0 before it has shown anything."""
    _at_ns: int = 0
    _differs_ns: int = 0
    """By how much the time of day was ahead when it began to disagree."""
    _since_ns: int | None = None
    """When that was, since boot; None while both agree."""
    _kept: tuple[int, int | None] | None = None
    """When the file was written, since boot, and what it says of a disagreement."""

    def begin(self, newest_ns: int) -> None:
        """Take up what an earlier service has kept; else the newest record's time is the witness.

        0 says that there are no records: then nothing can be deleted too early.
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
        """The time that output's age counts by, in ns since the epoch."""
        return min(self.steady_ns(), self._wall_ns())

    def steady_ns(self) -> int:
        """The time as this clock has it, also where the time of day was set back."""
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
        except OSError as error:  # then an earlier time is the witness
            if error.errno not in _NO_ROOM:
                what = "cannot keep the time that output's age counts by in %s: %s; see what it is"
                log.warning(what, self._path, error.strerror)
