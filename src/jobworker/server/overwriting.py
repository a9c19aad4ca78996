"""Whether the room that the history sets aside for ends holds on the file system below it.

SQLite writes to a mapped file too (history.db-shm). Where btrfs has no new block for that page, the
kernel ends the process that writes to it: seen on a full disk with Linux 6.
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
"""File systems that never overwrite, by what statfs(2) calls them."""


def check_overwrites(directory: Path) -> str:
    """Say that the room holds. Raises ConfigError where it does not.

    It asks for the kind of the file system: what is below an overlay or a network is not seen.
    """
    kind = _WRITES_ELSEWHERE.get(file_system_type(str(directory)))
    if kind is None:
        return "set aside in the history, for a disk that is full"
    raise ConfigError(
        f"cannot keep room for jobs' ends in {directory}: {kind} writes each block to a new place, "
        "so a full disk may refuse an end, or end the service (SIGBUS), until there is room",
        remedy="put worker.state_dir on ext4 or XFS, or see that this disk never fills",
    )


def overwrite_warnings(directory: Path) -> tuple[str, ...]:
    """What is to be logged of that at the start."""
    try:
        check_overwrites(directory)
    except ConfigError as error:
        return (str(error),)
    return ()
