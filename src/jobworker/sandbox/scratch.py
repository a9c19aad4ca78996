"""Removing what a job left on disk, however it is shaped.

A hostile job may leave a tree deeper than any recursion or path can go, or names by the
million. So nothing here recurses and no path has more than two components: a directory that is
not empty is moved up beside its parent and emptied in its turn. Links are removed, never
followed. The caller runs `remove_tree` in a process of its own, since it may take long;
`remove_if_empty` is for the usual case of a job that left nothing.

Standard library only.
"""

import contextlib
import os
from collections.abc import Sequence
from itertools import count


def remove_if_empty(path: str, names: Sequence[str]) -> bool:
    """Remove the directory `path` and those in it called `names`; False if files are left."""
    with contextlib.suppress(FileNotFoundError):
        try:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(f"{path}/{name}")
            os.rmdir(path)
        except OSError:
            return False
    return True


def remove_tree(path: str) -> None:
    """Remove the directory `path` with all that it holds; one that is gone already is fine.

    Raises OSError where the kernel refuses, after everything else has been removed.
    """
    try:
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        refusal = _empty(top)
    finally:
        os.close(top)
    if refusal is not None:
        raise refusal
    os.rmdir(path)


def _empty(top: int) -> OSError | None:
    """Remove all that the directory `top` holds; the first refusal, after all else has gone."""
    refusal: OSError | None = None
    taken = {entry for entry, _ in _entries(top, "")}  # an earlier removal may have been cut short
    asides = (f".removing-{number}" for number in count(1))
    waiting = [""]
    while waiting:
        name = waiting.pop()
        try:
            for entry, is_directory in _entries(top, name):
                try:
                    if not is_directory:
                        os.unlink(f"{name}/{entry}" if name else entry, dir_fd=top)
                    elif not name:
                        waiting.append(entry)
                    else:
                        aside = next(path for path in asides if path not in taken)
                        os.rename(f"{name}/{entry}", aside, src_dir_fd=top, dst_dir_fd=top)
                        waiting.append(aside)
                except OSError as error:
                    refusal = refusal or error
            if name:
                os.rmdir(name, dir_fd=top)
        except OSError as error:
            refusal = refusal or error
    return refusal


def _entries(top: int, name: str) -> list[tuple[str, bool]]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    directory = os.open(name or ".", flags, dir_fd=top)
    try:
        with os.scandir(directory) as found:
            return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
    finally:
        os.close(directory)
