"""Processes that let go of what ended jobs had on disk, so that the launcher need not wait.

A hostile job can make that take long: a million names, a tree deeper than any path. What waits is
taken by the next process that is started, as much of it as it can be given; there are a few at a
time. The launcher itself does nothing on the file system, not even where a directory seems to be
empty: rmdir(2) waits for the journal, and goes through every block of a directory that was large
once.

Standard library only.
"""

import contextlib
import fcntl
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.launcher import scratch
from jobworker.sandbox.log import say

MAX_SWEEPERS = 4
MAX_EACH = 60
"""Disks, paths and descriptors, each, that one process is given: they fit one call."""
AGAIN_SECONDS = 0.5
MAX_KEPT_DISKS = 4
"""While so many disks of ended jobs are kept by descriptors in others, no job gets a volume:
through one they are passed. Each costs a loop device, and memory up to its job's limit."""

T = TypeVar("T")


class _Load(NamedTuple):
    """What one process lets go of."""

    disks: list[disk_images.Disk]
    paths: list[str]
    others: list[int]
    """Descriptors that only have to be closed."""
    watched: list[int]
    """Images of disks, where it matters whether they are really gone afterwards."""


class Sweepers:
    """The processes, and what waits for one."""

    def __init__(self, turns: Turns, forks: ForkServer) -> None:
        self._turns = turns
        self._chores = Chores(turns, forks, at_once=MAX_SWEEPERS, waiting=0)
        self._disks: list[disk_images.Disk] = []
        self._paths: list[str] = []
        self._others: list[int] = []
        self._watched: list[int] = []
        self._kept: list[int] = []
        """Watched images whose disks were still there when their process had ended."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, and no process is under way."""
        return not (self._waits or self._chores.running)

    def discard_disk(self, disk: disk_images.Disk, overlay: int | None, *, shared: bool) -> None:
        """Let go of a disk and of the overlay on it, whose root's descriptor is taken over, too.

        `shared` is for a job that could give descriptors to others, see `count_kept`.
        """
        self._disks.append(disk)
        if shared:
            with contextlib.suppress(OSError):  # no descriptor left: it is not counted
                self._watched.append(fcntl.fcntl(disk.image, fcntl.F_DUPFD_CLOEXEC, 0))
        if overlay is not None:
            self._others.append(overlay)
        self._start()

    def close(self, descriptors: list[int]) -> None:
        """Close descriptors, where the last close may have a file system unmounted."""
        self._others += descriptors
        self._start()

    def count_kept(self) -> int:
        """How many disks of ended jobs are still mounted, by descriptors that other jobs have."""
        gone = [image for image in self._kept if not disk_images.is_attached(image)]
        if gone:
            self._kept = [image for image in self._kept if image not in gone]
            self.close(gone)
        return len(self._kept)

    def remove(self, path: str) -> None:
        """Remove a directory and what it holds; one that is gone already is fine."""
        self._paths.append(path)
        self._start()

    def _start(self) -> None:
        while self._waits and self._chores.running < MAX_SWEEPERS:
            load = self._take()
            given = [*load.others, *(number for disk in load.disks for number in disk)]
            work = partial(_sweep, load.disks, load.paths)
            try:
                self._chores.start(work, partial(self._on_end, load), given=given)
            except OSError:  # no descriptor to be had
                self._try_later(load)
                return

    @property
    def _waits(self) -> bool:
        return bool(self._disks or self._paths or self._others)

    def _take(self) -> _Load:
        load = _Load(
            self._disks[:MAX_EACH], self._paths[:MAX_EACH], self._others[:MAX_EACH], self._watched
        )
        del self._disks[:MAX_EACH], self._paths[:MAX_EACH], self._others[:MAX_EACH]
        self._watched = []
        return load

    def _try_later(self, load: _Load) -> None:
        self._disks[:0], self._paths[:0], self._others[:0] = load.disks, load.paths, load.others
        self._watched += load.watched
        self._turns.call_in(AGAIN_SECONDS, self._start)

    def _on_end(self, load: _Load, outcome: Message) -> None:
        if "begun" in outcome:  # there was no process to be had
            self._try_later(load)
            return
        self._kept += load.watched
        self._turns.see_through(self._go_on)

    def _go_on(self) -> None:
        self.count_kept()
        self._start()


def _sweep(disks: list[disk_images.Disk], paths: list[str]) -> Message:
    """In the process: what cannot be removed now is removed at the launcher's next start."""
    for disk in disks:
        _try(disk_images.discard, disk)
    for path in paths:
        _try(scratch.remove_tree, path)
    return {}


def _try(remove: Callable[[T], None], what: T) -> None:
    try:
        remove(what)
    except OSError as error:
        say(f"cannot clear away what a job left on disk: {error}")
