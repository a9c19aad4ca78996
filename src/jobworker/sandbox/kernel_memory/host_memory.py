"""The host's own figures of kernel memory: a cheap sign that some job may have taken more.

There are three figures, read from files that stay open:

- the memory of slabs that cannot be reclaimed: SUnreclaim of /proc/meminfo. It includes locks,
  small buffers and structures.
- the memory in buffers of all TCP sockets: /proc/net/sockstat.
- the pages that the kernel has taken and /proc/meminfo has no name for. They include larger buffers
  of sockets, pipes, and the memory of drivers. The figure is the host's memory less all kinds that
  /proc/meminfo names, and less the free pages that each processor keeps for itself
  (/proc/zoneinfo). /proc/meminfo counts those free pages as taken, and they may be a gigabyte
  (1.2 GB were seen on two processors). Without them, the figure would not show a program that takes
  its buffers from these pages.

One reading takes 0.1 ms with two processors. Standard library only. Sources: proc_meminfo(5),
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
"""The kinds in /proc/meminfo that share no page with each other."""
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


class HostMemory:
    """The figures, in bytes; a figure that this kernel does not have never changes."""

    def __init__(self) -> None:
        self._meminfo = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
        self._zones = _open("/proc/zoneinfo")
        # The figure is of the whole host, in whichever network namespace this is read.
        self._sockets = _open("/proc/net/sockstat")

    def unreclaimable(self) -> int:
        """The memory of slabs that cannot be reclaimed."""
        return _of_kind(_text(self._meminfo), b"SUnreclaim")

    def unnamed(self) -> int:
        """The pages that the kernel has taken and /proc/meminfo has no name for."""
        meminfo = _text(self._meminfo)
        parts = _text(self._zones).split(b" count:")[1:]
        kept = sum(int(part[: part.index(b"\n")]) for part in parts) * _PAGE_BYTES
        named = sum(_of_kind(meminfo, kind) for kind in _NAMED)
        return _of_kind(meminfo, b"MemTotal") - named - kept

    def in_tcp(self) -> int:
        """The memory in buffers of all TCP sockets."""
        return tcp_bytes(_text(self._sockets))


class GrowthDetector:
    """One figure, and its calm value: the lowest since growth was last reported."""

    def __init__(self, read: Callable[[], int], step_bytes: int) -> None:
        self._read, self._step_bytes = read, step_bytes
        self._calm = sys.maxsize
        self.wake()

    def wake(self) -> None:
        """Lower the calm value to the current one, if that is lower, after a break in readings."""
        self._calm = min(self._calm, self._now())

    def has_grown(self) -> bool:
        """Whether the figure is more than a step above its calm value.

        The calm value then becomes the current one, so the same growth is reported only once.
        """
        now = self._now()
        self._calm = min(self._calm, now)
        if now <= self._calm + self._step_bytes:
            return False
        self._calm = now
        return True

    def _now(self) -> int:
        """The current value; the calm value if it cannot be read."""
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
    """The whole content of a file; the kernel returns a long one in parts."""
    parts, at = [], 0
    while part := os.pread(file, 1 << 16, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)
