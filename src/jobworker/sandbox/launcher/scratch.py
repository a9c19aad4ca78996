"""Removes the files that a job left on disk, whatever their number and depth.

A hostile job may leave a tree that is deeper than any recursion or path can go, or millions of
names. So the depth of calls here is bounded, and no path has more than two components: a directory
that is not empty is moved up beside its parent, and emptied there later. Links are removed and
never followed. The caller runs `remove_tree` in a process of its own, since it may take long.

Standard library only.
"""

import errno
import os
from collections.abc import Iterator
from itertools import count


def remove_tree(path: str) -> None:
    """Remove the directory `path` with its contents, if it exists.

    The memory for that is bounded, whatever the tree. If the kernel refuses to remove an entry,
    everything else is removed first, and then the first OSError is raised.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        top = os.open(path, flags)
    except FileNotFoundError:
        return
    try:
        asides = (f".removing-{number}" for number in count(1))
        progress = True
        while progress:
            refusals: list[OSError] = []
            progress = _pass_over(top, "", asides, refusals)
    finally:
        os.close(top)
    if refusals:
        raise refusals[0]
    os.rmdir(path)


def _pass_over(top: int, name: str, asides: Iterator[str], refusals: list[OSError]) -> bool:
    """Go over the directory `name` in `top` once. Returns whether an entry was removed or moved.

    The first refusal of the kernel is added to `refusals`. Entries are removed while the directory
    is read, so the kernel may skip some of them. Therefore the caller makes another pass.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    directory = os.open(name or ".", flags, dir_fd=top)
    progress = False
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    progress |= _take_away(top, directory, name, entry, asides, refusals)
                except OSError as error:
                    if not refusals:
                        refusals.append(error)
    finally:
        os.close(directory)
    return progress


def _take_away(
    top: int,
    directory: int,
    name: str,
    entry: "os.DirEntry[str]",
    asides: Iterator[str],
    refusals: list[OSError],
) -> bool:
    """Remove an entry, or move it up, or remove a part of it.

    Returns False or raises OSError if none of these was possible.
    """
    if not entry.is_dir(follow_symlinks=False):
        os.unlink(entry.name, dir_fd=directory)
    elif name:
        _move_up(top, directory, entry.name, asides)
    else:
        progress = _pass_over(top, entry.name, asides, refusals)
        try:
            os.rmdir(entry.name, dir_fd=top)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            return progress
    return True


def _move_up(top: int, directory: int, name: str, asides: Iterator[str]) -> None:
    while True:
        try:
            os.rename(name, next(asides), src_dir_fd=directory, dst_dir_fd=top)
        except OSError as error:
            # An earlier removal that was interrupted may have left that name: take the next one.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return
