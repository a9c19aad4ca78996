"""Processes that let go of what ended jobs had on disk, so that the launcher need not wait.

A hostile job can make that take long: a million names, a tree deeper than any path. What waits is
taken by the next process that is started, all of it at once; there are a few at a time.

Standard library only.
"""

import os
from collections.abc import Callable
from typing import NoReturn, TypeVar

from jobworker.sandbox import disk_images, scratch
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.channel import close_all

MAX_SWEEPERS = 4

T = TypeVar("T")


class Sweepers:
    """The processes, and what waits for one."""

    def __init__(self) -> None:
        self.running: dict[int, int] = {}
        """pid by pidfd, which somebody has to watch: see `reap`."""
        self._disks: list[int] = []
        self._paths: list[str] = []

    def discard_disk(self, root: int) -> None:
        """Let go of a disk, by a descriptor of its root, which is taken over."""
        self._disks.append(root)
        self._start()

    def remove(self, path: str, names: tuple[str, ...]) -> None:
        """Remove a directory; at once if it holds nothing but empty directories of these names."""
        if not scratch.remove_if_empty(path, names):
            self._paths.append(path)
            self._start()

    def reap(self, pidfd: int) -> None:
        """Collect an ended process, whose descriptor is readable."""
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        del self.running[pidfd]
        self._start()

    def _start(self) -> None:
        if not (self._disks or self._paths) or len(self.running) >= MAX_SWEEPERS:
            return
        try:
            pid, pidfd = sc.clone3(0)
        except OSError:
            return  # no process to be had: the next one that ends makes room, or the next start
        if pid == 0:
            _sweep_and_exit(self._disks, self._paths)
        close_all(self._disks)
        self._disks, self._paths = [], []
        self.running[pidfd] = pid


def _sweep_and_exit(disks: list[int], paths: list[str]) -> NoReturn:
    """In the process: what cannot be removed now is removed at the launcher's next start."""
    try:
        _close_all_but(disks)
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
        told = f"launcher: cannot clear away what a job left on disk: {error}\n"
        os.write(2, told.encode("utf-8", "replace"))


def _close_all_but(kept: list[int]) -> None:
    """Close what belongs to others: it would be kept open."""
    first = 3
    for descriptor in sorted(kept):
        if descriptor > first:
            sc.close_range(first, descriptor - 1)
        first = descriptor + 1
    sc.close_range(first)
