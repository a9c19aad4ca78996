"""Processes that let go of what ended jobs had on disk, so that the launcher need not wait.

A hostile job can make that take long: a million names, a tree deeper than any path. What waits is
taken by the next process that is started, all of it at once; there are a few at a time. The
launcher itself does nothing on the file system, not even where a directory seems to be empty:
rmdir(2) waits for the journal, and goes through every block of a directory that was large once.

Standard library only.
"""

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable
from typing import NoReturn, TypeVar

from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.disposal import close_all_but, give_away
from jobworker.sandbox.launcher import scratch
from jobworker.sandbox.log import say

MAX_SWEEPERS = 4
MAX_KEPT_DISKS = 4
"""While so many disks of ended jobs are kept by descriptors in others, no job gets a volume:
through one they are passed. Each costs a loop device, and memory up to its job's limit."""

T = TypeVar("T")


class Sweepers:
    """The processes, and what waits for one."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        """pidfds, which somebody has to watch: see `reap`."""
        self._disks: list[disk_images.Disk] = []
        self._paths: list[str] = []
        self._others: list[int] = []
        self._watched: list[int] = []
        """Images of disks that wait, where it matters whether they are really gone then."""
        self._under_way: dict[int, list[int]] = {}
        """Such images that a process is busy with, by its pidfd."""
        self._kept: list[int] = []
        """Such images whose disks were still there when their process had ended."""

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

    def end(self, pidfd: int) -> None:
        """Kill a process that nobody needs after all, and have it reaped with the others."""
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self.running.add(pidfd)

    def reap(self, pidfd: int) -> bool:
        """Collect a process whose descriptor is readable, and close that; then `go_on`.

        False where it cannot be collected yet: a tracer of the host's has it. Not to be called
        again once it has returned True: the number may be another descriptor's.
        """
        if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None:
            return False
        self.running.discard(pidfd)
        self._kept += self._under_way.pop(pidfd, ())
        os.close(pidfd)
        return True

    def go_on(self) -> None:
        """Start a process for what waits, now that one has ended."""
        self.count_kept()
        self._start()

    @property
    def stuck(self) -> bool:
        """Whether something waits, and no process is under way whose end has it taken."""
        return bool(self._disks or self._paths or self._others) and not self.running

    def _start(self) -> None:
        if not (self._disks or self._paths or self._others) or len(self.running) >= MAX_SWEEPERS:
            return
        try:
            pid, pidfd = give_away([*self._others, *(n for disk in self._disks for n in disk)])
        except OSError:
            return  # no process to be had: see `stuck`
        if pid == 0:
            _sweep_and_exit(self._disks, self._paths)
        self._under_way[pidfd] = self._watched
        self._disks, self._paths, self._others, self._watched = [], [], [], []
        self.running.add(pidfd)


def _sweep_and_exit(disks: list[disk_images.Disk], paths: list[str]) -> NoReturn:
    """In the process: what cannot be removed now is removed at the launcher's next start."""
    try:
        close_all_but([descriptor for disk in disks for descriptor in disk])
        for disk in disks:
            _try(disk_images.discard, disk)
        for path in paths:
            _try(scratch.remove_tree, path)
    finally:
        os._exit(0)


def _try(remove: Callable[[T], None], what: T) -> None:
    try:
        remove(what)
    except OSError as error:
        say(f"cannot clear away what a job left on disk: {error}")
