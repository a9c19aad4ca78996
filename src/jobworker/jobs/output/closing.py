"""Closes the files of a spool, without making the event loop wait for the file system."""

import os
from collections.abc import Sequence

import trio

from jobworker.sandbox.channel import close_all
from jobworker.threads import in_thread

_closing = trio.lowlevel.RunVar[trio.CapacityLimiter]("closing")
"""One thread at a time closes removed files, since the file system may have gigabytes to free."""


def close_files(files: Sequence[int]) -> None:
    """Close files; if one of them was removed, in a thread: the file system then frees blocks."""
    if trio.lowlevel.in_trio_run() and any(not os.fstat(file).st_nlink for file in files):
        trio.lowlevel.spawn_system_task(_close_removed, files)
    else:
        close_all(files)


async def _close_removed(files: Sequence[int]) -> None:
    try:
        limiter = _closing.get()
    except LookupError:
        _closing.set(limiter := trio.CapacityLimiter(1))
    with trio.CancelScope(shield=True):
        await in_thread(close_all, files, limiter=limiter)
