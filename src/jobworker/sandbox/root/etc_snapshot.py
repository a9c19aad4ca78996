"""A snapshot of the host's /etc: allow-listed names, of what every user of the host may read.

Never shadow, ssh or private keys, however they came under an allowed name. The copies belong to
the job's root, which may change its own.

Standard library only.
"""

import os
import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_MAX_FILE_BYTES = 4 << 20
_MAX_ENTRIES = 20_000


class Entry(NamedTuple):
    """One name of the /etc snapshot: a directory, a file's content, or a link's target."""

    path: str
    mode: int
    content: bytes | None
    target: str | None


def snapshot_etc(names: Iterable[str], base: str = "/etc") -> list[Entry]:
    """Read the allow-listed `names` below /etc, as far as every user of the host may.

    A link stays a link where it ends inside /usr or inside what is allowed; where it leads
    elsewhere (resolv.conf to /run, say) the file at its end is copied.
    """
    allowed = [os.path.normpath(os.path.join(base, name)) for name in names]
    entries: list[Entry] = []
    waiting = [path for path in allowed if path.startswith(base + "/") and _is_reachable(path)]
    while waiting and len(entries) < _MAX_ENTRIES:
        path = waiting.pop()
        entry, below = _read_entry(path, allowed)
        if entry is not None:
            entries.append(entry)
            waiting.extend(below)
    return entries


def _read_entry(path: str, allowed: Sequence[str]) -> tuple[Entry | None, list[str]]:
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            end = os.path.realpath(path)
            if any(end == a or end.startswith(a + "/") for a in ("/usr", *allowed)):
                return Entry(path, 0, None, os.readlink(path)), []
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
            return Entry(path, 0o755, None, None), below
        if stat.S_ISREG(status.st_mode) and status.st_size <= _MAX_FILE_BYTES:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            with open(os.open(path_to_read, flags), "rb") as file:
                return Entry(path, status.st_mode & 0o755 | 0o644, file.read(), None), []
    except OSError:
        pass  # gone or unreadable since: what cannot be read is not shown
    return None, []


def _is_reachable(path: str) -> bool:
    """Whether every user of the host may pass through the directories above `path`."""
    while path != "/":
        path = os.path.dirname(path)
        try:
            if not os.stat(path).st_mode & stat.S_IXOTH:
                return False
        except OSError:
            return False
    return True


def write_entry(path: str, entry: Entry) -> None:
    """Write an entry of the snapshot to `path`; what stands there already is kept if a link."""
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
