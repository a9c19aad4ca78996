"""Has processes release what ended jobs had on disk, so that the launcher does not wait for it.

A hostile job can make that take long, with a million names or a tree that is deeper than any path.
Up to `MAX_SWEEPERS` processes run at a time, and each takes up to `MAX_EACH` of the disks, paths
and descriptors that wait. The launcher itself does nothing on the file system, even if a directory
seems to be empty: rmdir(2) waits for the journal, and reads every block of a directory that was
large before.

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
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.launcher import scratch
from jobworker.sandbox.log import log_line

MAX_SWEEPERS = 4
MAX_EACH = 60
"""How many disks, how many paths and how many descriptors one process gets: they fit one call."""
AGAIN_SECONDS = 0.5
LOOK_AT_KEPT_SECONDS = 1.0
MAX_KEPT_DISKS = 4
"""While descriptors in other jobs keep so many disks of ended jobs mounted, no job gets a volume,
since jobs pass such descriptors over a socket in a volume. Each of these disks costs a loop device,
and memory up to its job's limit."""

T = TypeVar("T")


class _Load(NamedTuple):
    """What one process releases."""

    disks: list[disk_images.Disk]
    paths: list[str]
    others: list[int]
    """Descriptors that only have to be closed."""
    watched: list[int]
    """Images of disks that another job may keep mounted: see `Sweepers.count_kept`."""


class Sweepers:
    """The processes, and the disks, paths and descriptors that wait for one."""

    def __init__(self, event_loop: EventLoop, forks: ForkServer) -> None:
        self._event_loop = event_loop
        self._chores = Chores(event_loop, forks, at_once=MAX_SWEEPERS, waiting=0)
        self._disks: list[disk_images.Disk] = []
        self._paths: list[str] = []
        self._others: list[int] = []
        self._watched: list[int] = []
        self._kept: list[int] = []
        """Watched images whose processes have ended. Those of unmounted disks are dropped later."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, and no process is running."""
        return not (self._waits or self._chores.running)

    def discard_disk(self, disk: disk_images.Disk, overlay: int | None, *, shared: bool) -> None:
        """Discard a disk and the overlay on it. Takes over the descriptors of both.

        `overlay`: a descriptor of the overlay's root. `shared`: the job could send descriptors to
        others, so the disk is watched for `count_kept`.
        """
        self._disks.append(disk)
        if shared:
            with contextlib.suppress(OSError):  # without a descriptor the disk is not counted
                self._watched.append(fcntl.fcntl(disk.image, fcntl.F_DUPFD_CLOEXEC, 0))
        if overlay is not None:
            self._others.append(overlay)
        self._start()

    def close(self, descriptors: list[int]) -> None:
        """Close descriptors whose last close may unmount a file system."""
        self._others += descriptors
        self._start()

    def count_kept(self) -> int:
        """How many disks of ended jobs are still mounted because other jobs have descriptors."""
        gone = [image for image in self._kept if not disk_images.is_attached(image)]
        if gone:
            self._kept = [image for image in self._kept if image not in gone]
            self.close(gone)
        return len(self._kept)

    def remove(self, path: str) -> None:
        """Remove a directory and its contents, if it exists."""
        self._paths.append(path)
        self._start()

    def _start(self) -> None:
        while self._waits and self._chores.running < MAX_SWEEPERS:
            load = self._take()
            given = [*load.others, *(number for disk in load.disks for number in disk)]
            work = partial(_sweep, load.disks, load.paths)
            try:
                self._chores.start(work, partial(self._on_end, load), given=given)
            except OSError:  # no descriptor is left
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
        self._event_loop.call_later(AGAIN_SECONDS, self._start)

    def _on_end(self, load: _Load, outcome: Message) -> None:
        if "begun" in outcome:  # no process could be made
            self._try_later(load)
            return
        self._kept += load.watched
        self._event_loop.call_with_retries(self._go_on)

    def _go_on(self) -> None:
        self._look_at_kept()
        self._start()

    def _look_at_kept(self) -> None:
        """Drop images of unmounted disks, now and as long as there are others.

        The kernel may detach a disk a moment after the process has ended. Until the next look the
        launcher keeps a descriptor of its image.
        """
        if self.count_kept() and not self._event_loop.is_scheduled(self._look_at_kept):
            self._event_loop.call_later(LOOK_AT_KEPT_SECONDS, self._look_at_kept)


def _sweep(disks: list[disk_images.Disk], paths: list[str]) -> Message:
    """In the process: discard the disks and remove the paths.

    A path that cannot be removed stays until the next launcher starts.
    """
    for disk in disks:
        _try(disk_images.discard, disk)
    for path in paths:
        _try(scratch.remove_tree, path)
    return {}


def _try(remove: Callable[[T], None], what: T) -> None:
    try:
        remove(what)
    except OSError as error:
        log_line(f"cannot clear away what a job left on disk: {error}")
