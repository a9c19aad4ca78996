"""Checks that the history's file system overwrites blocks in place.

The space that the history reserves for jobs' ends depends on that.

The history overwrites pages that it has allocated before. A file system that writes each block to a
new place (copy-on-write) needs free space for that too, so a full disk may refuse the write. SQLite
also writes to a mapped file (history.db-shm). If btrfs has no new block for that page, the kernel
kills the process that writes to it (SIGBUS): seen on a full disk with Linux 6.
"""

from pathlib import Path

from jobworker.errors import ConfigError
from jobworker.sandbox.syscalls import file_system_type

_WRITES_ELSEWHERE = {
    0x9123683E: "btrfs",
    0x2FC12FC1: "ZFS",
    0xCA451A4E: "bcachefs",
    0xF2F52010: "F2FS",
    0x3434: "NILFS2",
}
"""File systems that never overwrite a block in its place, by their type in statfs(2)."""


def check_overwrites(directory: Path) -> str:
    """A line for `worker check` that the room holds. Raises ConfigError if it does not.

    The check reads the type of the file system. It does not see what lies below an overlay or a
    network file system.
    """
    kind = _WRITES_ELSEWHERE.get(file_system_type(str(directory)))
    if kind is None:
        return "set aside in the history, for a disk that is full"
    raise ConfigError(
        f"cannot keep room for jobs' ends in {directory}: {kind} writes each block to a new place, "
        "so a full disk may refuse an end, or end the service (SIGBUS), until there is room",
        remedy="put worker.state_dir on ext4 or XFS, or make sure that this disk never fills",
    )


def overwrite_warnings(directory: Path) -> tuple[str, ...]:
    """The warnings of `check_overwrites` that the service logs at its start."""
    try:
        check_overwrites(directory)
    except ConfigError as error:
        return (str(error),)
    return ()
