"""Copies the part of the host's /etc that jobs see: allow-listed names that every user may read.

A file that some user of the host may not read is never copied, such as shadow or a private key,
even if it stands below an allowed name. The copies belong to the job's root user, who may change
them in this job's own disk.

Standard library only.
"""

import os
import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_MAX_FILE_BYTES = 4 << 20
_MAX_ENTRIES = 20_000


class EtcEntry(NamedTuple):
    """One entry of the snapshot: a directory, a file with its content, or a link and its target."""

    path: str
    mode: int
    content: bytes | None
    target: str | None


def snapshot_etc(names: Iterable[str], base: str = "/etc") -> list[EtcEntry]:
    """The entries below `base` that `names` allow and every user of the host may read.

    A link stays a link if it leads into /usr or into another allowed name. If it leads elsewhere,
    as resolv.conf often does to /run, the file that it leads to is copied. A file of more than
    4 MiB is left out, and the snapshot ends at 20,000 entries.
    """
    allowed = [os.path.normpath(os.path.join(base, name)) for name in names]
    entries: list[EtcEntry] = []
    waiting = [path for path in allowed if path.startswith(base + "/") and _is_reachable(path)]
    while waiting and len(entries) < _MAX_ENTRIES:
        path = waiting.pop()
        entry, below = _read_entry(path, allowed)
        if entry is not None:
            entries.append(entry)
            waiting.extend(below)
    return entries


def _read_entry(path: str, allowed: Sequence[str]) -> tuple[EtcEntry | None, list[str]]:
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            end = os.path.realpath(path)
            if any(end == a or end.startswith(a + "/") for a in ("/usr", *allowed)):
                return EtcEntry(path, 0, None, os.readlink(path)), []
            path_to_read = end
            status = os.lstat(end)
        else:
            path_to_read = path
        if not status.st_mode & stat.S_IROTH or not (path_to_read == path or _is_reachable(end)):
            return None, []
        if stat.S_ISDIR(status.st_mode) and path_to_read == path:
            if not status.st_mode & stat.S_IXOTH:
                return None, []
            below = [f"{path}/{name}" for name in sorted(os.listdir(path))]
            return EtcEntry(path, 0o755, None, None), below
        if stat.S_ISREG(status.st_mode) and status.st_size <= _MAX_FILE_BYTES:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            with open(os.open(path_to_read, flags), "rb") as file:
                return EtcEntry(path, status.st_mode & 0o755 | 0o644, file.read(), None), []
    except OSError:
        pass  # the file has gone or become unreadable: the job does not see it
    return None, []


def _is_reachable(path: str) -> bool:
    """Whether every user of the host may search all directories above `path`."""
    while path != "/":
        path = os.path.dirname(path)
        try:
            if not os.stat(path).st_mode & stat.S_IXOTH:
                return False
        except OSError:
            return False
    return True


def write_entry(path: str, entry: EtcEntry) -> None:
    """Write `entry` to `path`. A link does not replace a file or link that is there already."""
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    if entry.target is not None:
        if not os.path.lexists(path):
            os.symlink(entry.target, path)
    elif entry.content is None:
        os.makedirs(path, entry.mode, exist_ok=True)
    else:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags, entry.mode), "wb") as file:
            file.write(entry.content)
