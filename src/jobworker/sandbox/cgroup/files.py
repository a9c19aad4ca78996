"""Reads, writes, removes and kills control groups, by a name below an open directory.

A group is addressed as (top, name): the descriptor of a directory of ours and a path below it. A
descriptor keeps its mount alive. So these functions need no path of /sys/fs/cgroup, and go on to
work after the process has left the mount namespace in which it started. A control file is opened
for each access (a few microseconds) and then closed, so that a job does not cost a descriptor for
each of its files.

What must hold: a limit is read back after it was written, because the kernel rounds some values and
ignores others without an error; a process is killed only if a pidfd holds it and it is a member
then.
"""

import errno
import os
import signal
from collections.abc import Callable

from jobworker import errors

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
GONE = frozenset({errno.ENOENT, errno.ENODEV})  # removed before, or while it was open
KILL_ROUNDS = 1000


def read(top: int, path: str) -> str:
    """The text of a control file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=top)
    try:
        chunks = []
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)
    return b"".join(chunks).decode("ascii", "replace")


def write(top: int, path: str, value: str) -> None:
    """Write a value in one system call, as the kernel demands of control files. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=top)
    try:
        os.write(descriptor, value.encode("ascii"))
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(descriptor)


def exists(top: int, path: str) -> bool:
    """Whether the file or directory exists."""
    return os.access(path, os.F_OK, dir_fd=top)


def table(text: str) -> dict[str, int]:
    """The numbers in a flat keyed file such as memory.events, by key.

    Each line is "KEY VALUE"; other lines are skipped.
    """
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}


def set_limit(top: int, path: str, value: str, accepted: Callable[[str], bool]) -> None:
    """Write a limit and read it back.

    Raises `SandboxError` with the file, the value and the kernel's reason. It also raises if the
    kernel accepts the write, but `accepted` is false for the text that the file has afterwards.
    """
    try:
        write(top, path, value)
        kept = read(top, path).strip()
    except OSError as error:
        raise refused(path, value, str(error.strerror)) from error
    if not accepted(kept):
        raise refused(path, value, f"the kernel kept {kept!r}")


def refused(path: str, value: str, reason: str, remedy: str = "") -> errors.SandboxError:
    """The error for a limit that cannot be set."""
    return errors.SandboxError(
        f"cannot set {path.removeprefix('./')} to {value}: {reason}",
        remedy=remedy,
        data={"step": "limits"},
    )


def groups_below(top: int, name: str) -> list[str]:
    """The paths of the group and of all groups below it, deepest first; empty if it is gone."""
    try:
        descriptor = os.open(name, DIRECTORY, dir_fd=top)
    except FileNotFoundError:
        return []
    try:
        children = subgroups(descriptor)
    finally:
        os.close(descriptor)
    below = [path for child in children for path in groups_below(top, f"{name}/{child}")]
    return [*below, name]


def groups_called(name: str, below: str = "/sys/fs/cgroup") -> list[str]:
    """The paths of all groups of this name, in any hierarchy below the directory `below`."""
    return [f"{path}/{name}" for path, names, _ in os.walk(below) if name in names]


def subgroups(descriptor: int) -> list[str]:
    """The names of the groups directly below an open group."""
    with os.scandir(descriptor) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def remove_group(top: int, name: str) -> None:
    """Remove a group, if it exists, and the groups that a job may have made below it.

    Raises OSError (EBUSY) while a process is in it.
    """
    try:
        os.rmdir(name, dir_fd=top)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in {errno.EBUSY, errno.ENOTEMPTY}:
            raise
        for path in groups_below(top, name):
            os.rmdir(path, dir_fd=top)


def members(top: int, name: str) -> set[int]:
    """The pids of the processes in a group and below it, in this process's PID namespace."""
    found: set[int] = set()
    for path in groups_below(top, name):
        try:
            found.update(int(line) for line in read(top, f"{path}/cgroup.procs").split())
        except OSError as error:
            if error.errno not in GONE:
                raise
    found.discard(0)  # a process that has no number in our namespace
    return found


def kill_members(top: int, name: str) -> None:
    """Send SIGKILL to each process in a group, for kernels without cgroup.kill (before 5.14).

    It repeats until each listed process has been signalled. A process with a pending fatal signal
    cannot fork (fork(2) restarts), so each round leaves fewer. Raises OSError (EBUSY) after
    `KILL_ROUNDS` rounds.
    """
    signalled: set[int] = set()
    for _ in range(KILL_ROUNDS):
        listed = members(top, name)
        fresh = listed - signalled
        if not fresh:
            return
        _kill(fresh, lambda: members(top, name))
        signalled = (signalled & listed) | fresh
    raise OSError(errno.EBUSY, "processes appear faster than they can be killed", name)


def _kill(pids: set[int], members_now: Callable[[], set[int]]) -> None:
    """Kill the processes that are still members after a pidfd was opened for each of them.

    Without that check a pid that the kernel has reused could name another process.
    """
    held: dict[int, int] = {}
    try:
        for pid in pids:
            try:
                held[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
        for pid in members_now() & held.keys():
            try:
                signal.pidfd_send_signal(held[pid], signal.SIGKILL)
            except ProcessLookupError:
                continue
    finally:
        for descriptor in held.values():
            os.close(descriptor)
