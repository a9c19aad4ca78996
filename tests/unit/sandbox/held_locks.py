"""A lock of the kernel's that is held as long as a test likes: its holder waits for a page.

userfaultfd(2): who touches the page waits until somebody fills it, or closes the descriptor. A job
can do the same for seconds, with a page of a file that its I/O limit keeps from being read.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import struct
import threading
from collections.abc import Iterator

_NUMBER = {"x86_64": 323, "aarch64": 282}
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def held_epoll() -> Iterator[str]:
    """The fdinfo of an epoll instance of this process; who reads it waits until the end."""
    faults = _libc.syscall(_NUMBER[os.uname().machine], os.O_CLOEXEC | os.O_NONBLOCK)
    assert faults >= 0, os.strerror(ctypes.get_errno())
    fcntl.ioctl(faults, _UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
    page = mmap.mmap(-1, mmap.PAGESIZE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(page))
    asked = struct.pack("QQQQ", at, mmap.PAGESIZE, 1, 0)  # for pages that are missing
    fcntl.ioctl(faults, _UFFDIO_REGISTER, bytearray(asked))
    one = os.eventfd(1, os.EFD_CLOEXEC)
    with select.epoll() as epoll:
        epoll.register(one, select.EPOLLIN)
        wait = (epoll.fileno(), ctypes.c_void_p(at), 1, -1)
        holder = threading.Thread(target=_libc.epoll_wait, args=wait)
        holder.start()
        try:
            assert select.select([faults], [], [], 20)[0], "it has come to the page"
            yield f"/proc/{os.getpid()}/fdinfo/{epoll.fileno()}"
        finally:
            os.close(faults)
            holder.join()
            os.close(one)
