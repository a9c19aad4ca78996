"""The host's own figures of memory, which tell cheaply that some job may have taken more.

There are three, read from files that stay open:

- what slabs have that cannot be given back: SUnreclaim of /proc/meminfo. Locks, small buffers and
  structures are there.
- what all sockets of TCP have in buffers: /proc/net/sockstat.
- pages that the kernel has taken and has no name for. Larger buffers of sockets are there, and
  pipes and the memory of drivers. They are the host's memory less all kinds that /proc/meminfo
  names, and less the free pages that each processor keeps for itself (/proc/zoneinfo). Those count
  as taken in /proc/meminfo, and there may be a gigabyte of them (1.2 GB were seen on two
  processors): a program that takes buffers from these would not be noticed otherwise.

One look takes 0.1 ms with two processors. Standard library only. Sources: proc_meminfo(5),
mm/show_mem.c, mm/vmstat.c (zoneinfo_show_print), fs/proc/meminfo.c, net/ipv4/proc.c.
"""

import os
import sys
from collections.abc import Callable

from jobworker.sandbox.kernel_memory.connections import tcp_bytes

_NAMED = (
    b"MemFree Buffers Cached SwapCached AnonPages Slab KernelStack PageTables SecPageTables "
    b"Percpu Hugetlb Balloon"
).split()
"""The kinds that /proc/meminfo names and that have no page in common."""
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


class HostMemory:
    """The figures, in bytes; one that this kernel does not tell stays the same."""

    def __init__(self) -> None:
        self._meminfo = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
        self._zones = _open("/proc/zoneinfo")
        # What the whole host holds in buffers of sockets, whatever network this is read in.
        self._sockets = _open("/proc/net/sockstat")

    def unreclaimable(self) -> int:
        """What slabs have that cannot be given back."""
        return _of_kind(_text(self._meminfo), b"SUnreclaim")

    def unnamed(self) -> int:
        """Pages that the kernel has taken and has no name for."""
        meminfo = _text(self._meminfo)
        parts = _text(self._zones).split(b" count:")[1:]
        kept = sum(int(part[: part.index(b"\n")]) for part in parts) * _PAGE_BYTES
        named = sum(_of_kind(meminfo, kind) for kind in _NAMED)
        return _of_kind(meminfo, b"MemTotal") - named - kept

    def in_tcp(self) -> int:
        """What all sockets of TCP have in buffers."""
        return tcp_bytes(_text(self._sockets))


class Figure:
    """One of them: whether it has grown since it was calm."""

    def __init__(self, read: Callable[[], int], step_bytes: int) -> None:
        self._read, self._step_bytes = read, step_bytes
        self._calm = sys.maxsize
        self.wake()

    def wake(self) -> None:
        """It may have been less meanwhile."""
        self._calm = min(self._calm, self._now())

    def has_grown(self) -> bool:
        """Whether that is a reason to look; the same growth is one once."""
        now = self._now()
        self._calm = min(self._calm, now)
        if now <= self._calm + self._step_bytes:
            return False
        self._calm = now
        return True

    def _now(self) -> int:
        """What it is; as calm as it was where the kernel cannot tell just now."""
        try:
            return self._read()
        except OSError:
            return self._calm


def _of_kind(meminfo: bytes, kind: bytes) -> int:
    _, found, after = (b"\n" + meminfo).partition(b"\n" + kind + b":")
    return int(after[: after.index(b"kB")]) << 10 if found else 0


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # this kernel has no such file
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def _text(file: int) -> bytes:
    """All of it: the kernel gives a long one in parts."""
    parts, at = [], 0
    while part := os.pread(file, 1 << 16, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)
