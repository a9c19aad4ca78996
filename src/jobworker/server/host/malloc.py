"""Thin functions of glibc's malloc: how much freed memory it keeps, and its return to the kernel.

With another C library they do nothing. The service alone uses them (`server.host.memory`); the
launcher's system calls are in `sandbox.syscalls`.
"""

import ctypes

_libc = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)


def keep_freed_memory(trim_bytes: int, mmap_bytes: int) -> None:
    """Let malloc keep up to `trim_bytes` of freed memory, and use it for blocks below `mmap_bytes`.

    Threads that start afterwards share the main arena, since malloc_trim(3) does not return the
    free memory at the end of other arenas. Uses mallopt(3) of glibc; does nothing with another C
    library.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, trim_bytes)
        mallopt(_M_MMAP_THRESHOLD, mmap_bytes)
        mallopt(_M_ARENA_MAX, 1)


class _MallocInfo(ctypes.Structure):
    """struct mallinfo2 of mallinfo2(3)."""

    _fields_ = [(f"field_{number}", ctypes.c_size_t) for number in range(8)] + [
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


def freed_bytes() -> int:
    """What malloc has that is free, given back or not: mallinfo2(3), of glibc 2.33; else 0."""
    mallinfo2 = getattr(_libc, "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _MallocInfo
    return int(mallinfo2().fordblks)


def give_back_freed_memory() -> None:
    """Return all free pages of malloc to the kernel: malloc_trim(3) of glibc.

    Does nothing with another C library.
    """
    malloc_trim = getattr(_libc, "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))
