"""The memory that a job's pipes may hold in pages which no control group counts.

The kernel charges data that write(2) puts into a pipe to the writer. It does not charge data that
splice(2) and sendfile(2) move there from a socket over IP, or from a device such as /dev/zero. The
pipe keeps those pages, and the socket's buffer, which has a bound, is free again. A pipe has slots,
16 by default and up to fs.pipe-max-size / 4096. Each slot keeps a whole piece of memory, even if
the pipe has only one byte of it; a piece that a TCP socket has made is 32 KiB. Measured on Linux
6.18: 9,000 pipes held 1,494 MiB, while their job was charged 17 MiB.

The kernel does not show which piece a slot has, nor whether it is charged. So there are two
figures: the bytes in a pipe, each of which takes memory, and the most memory that its slots may
keep.

Reading the figures of a pipe takes the pipe's lock, which a job can hold for as long as it likes.
So the caller reads them only if the job has so many pipes with data that it may be over its bound;
poll(2) shows without the lock whether a pipe has data. Standard library only. Sources: pipe(7),
splice(2), fs/pipe.c, fs/splice.c (copy_splice_read), net/core/sock.c (skb_page_frag_refill).
"""

import contextlib
import fcntl
import os
import select
import struct
import termios
from typing import NamedTuple

PAGE_BYTES = 4096
"""The bytes of fs.pipe-max-size that one slot takes."""
SLOT_BYTES = 32 << 10
"""The largest piece of memory that a socket makes for data to send."""
_MOST_BYTES = 1 << 20
"""The kernel's default of fs.pipe-max-size: the most bytes in the slots of one pipe."""


class InPipe(NamedTuple):
    """The memory of one pipe, or of several together."""

    bytes: int = 0
    most_bytes: int = 0
    """The most bytes that the slots may keep."""


def is_filled(descriptor: int) -> bool | None:
    """Whether the pipe has data; None for a writing end, which shows only if a page has room.

    Takes no lock.
    """
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        return None
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def held_in(descriptor: int) -> InPipe:
    """Read the figures of a pipe. Takes the pipe's lock. Raises OSError."""
    answer = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    (size,) = struct.unpack("i", answer)
    slots = fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ) // PAGE_BYTES
    return InPipe(size, min(size, slots) * SLOT_BYTES)


def most_in_one() -> int:
    """The most bytes that the slots of one pipe may keep."""
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/fs/pipe-max-size") as file:
        return max(int(file.read()), _MOST_BYTES) // PAGE_BYTES * SLOT_BYTES
    return _MOST_BYTES // PAGE_BYTES * SLOT_BYTES
