"""Reads which files a job's threads have open or mapped, as /proc shows it.

Threads may share a table of descriptors, and also their mappings. Such a table is read once:
kcmp(2). A descriptor that is closed meanwhile, and a thread that ends, is left out.

Standard library only. Sources: proc_pid_fdinfo(5), proc_pid_maps(5).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

from jobworker.sandbox import syscalls as sc

_PIECE_BYTES = 1 << 16


def copy_of(thread: int, number: int, opened: contextlib.ExitStack) -> int:
    """A duplicate of a thread's descriptor, which `opened` closes. Raises OSError."""
    try:
        process = os.pidfd_open(thread, os.O_EXCL)  # PIDFD_THREAD
    except OSError:  # before Linux 6.9 only a process's first thread can be opened
        process = os.pidfd_open(thread)
    opened.callback(os.close, process)
    copy = sc.pidfd_getfd(process, number)
    opened.callback(os.close, copy)
    return copy


def descriptors(threads: Iterable[int]) -> Iterator[tuple[int, str, str]]:
    """The thread, the name and the link's target of each descriptor of these threads."""
    for thread in _distinct(threads, sc.KCMP_FILES):
        for name in _listed(f"/proc/{thread}/fd"):
            target = ""
            with contextlib.suppress(OSError):  # closed meanwhile
                target = os.readlink(f"/proc/{thread}/fd/{name}")
            yield thread, name, target


def fdinfo(thread: int, name: str) -> Iterator[list[bytes]]:
    """The lines of a descriptor's fdinfo, some at a time, since there may be millions."""
    with contextlib.suppress(OSError), open(f"/proc/{thread}/fdinfo/{name}", "rb") as file:
        while lines := file.readlines(_PIECE_BYTES):
            yield lines


def file_at(thread: int, name: str) -> str:
    """The file of a descriptor, in the form of /proc/locks; "" if it is closed."""
    with contextlib.suppress(OSError):
        status = os.stat(f"/proc/{thread}/fd/{name}")
        device = status.st_dev
        return f"{os.major(device):02x}:{os.minor(device):02x}:{status.st_ino}"
    return ""


def mapped_memory_files(threads: Iterable[int]) -> Iterator[str]:
    """The memfds that threads have mapped, in the form of /proc/locks; "" for another mapping.

    Other mapped files do not count, since any program maps libraries. No program maps a memfd by
    chance.
    """
    for thread in _distinct(threads, sc.KCMP_VM):
        with contextlib.suppress(OSError), open(f"/proc/{thread}/maps", "rb") as file:
            for line in file:
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(b"/memfd:"):
                    yield f"{fields[3].decode()}:{int(fields[4])}"
                else:
                    yield ""


def _distinct(threads: Iterable[int], kind: int) -> Iterator[int]:
    """One thread for each table of this kind, which several threads may share."""
    known: list[int] = []
    for thread in threads:
        try:
            at = _place_among(known, thread, kind)
        except OSError:  # one of the two has ended, or the kernel has no kcmp
            yield thread
            continue
        if at is not None:
            known.insert(at, thread)
            yield thread


def _place_among(known: Sequence[int], thread: int, kind: int) -> int | None:
    """The thread's place among `known` in the kernel's order; None if one shares its table."""
    low, high = 0, len(known)
    while low < high:
        middle = (low + high) // 2
        order = sc.kcmp(thread, known[middle], kind)
        if order == 0:
            return None
        low, high = (low, middle) if order == 1 else (middle + 1, high)
    return low


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
