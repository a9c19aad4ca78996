"""What the pipes of a job may hold in pages that no control group counts.

What write(2) puts into a pipe is charged to the writer. What splice(2) and sendfile(2) move there
from a socket over IP, or from a device such as /dev/zero, is not: the pipe keeps the pages, and the
socket's buffer, which had a bound, is free again. A pipe has slots, 16 by default and up to
fs.pipe-max-size / 4096, and each keeps a whole piece of memory, 32 KiB where a socket of TCP has
made it, though only a byte of it is in the pipe. Measured on Linux 6.18: 9,000 pipes, for which a
job was charged 17 MiB, held 1,494 MiB.

Nobody can tell which piece a slot has, nor whether it is charged. So there are two figures: the
bytes in a pipe, of which each takes memory at any rate, and what its slots keep at most.

To ask a pipe takes its lock, which a job can hold for as long as it likes. So the caller asks only
where there are so many pipes that are not empty, which poll(2) tells without the lock, that their
job may be over its bound. Standard library only. Sources: pipe(7), splice(2), fs/pipe.c,
fs/splice.c (copy_splice_read), net/core/sock.c (skb_page_frag_refill).
"""

import contextlib
import fcntl
import os
import select
import struct
import termios
from typing import NamedTuple

PAGE_BYTES = 4096
"""Of fs.pipe-max-size for each slot."""
SLOT_BYTES = 32 << 10
"""The largest piece that a socket makes for what it sends."""
_MOST_BYTES = 1 << 20
"""In the slots of one pipe, by the kernel's own fs.pipe-max-size."""


class InPipe(NamedTuple):
    """What one pipe holds, or several."""

    bytes: int = 0
    most_bytes: int = 0
    """What its slots keep at most."""


def is_filled(descriptor: int) -> bool | None:
    """Whether there is something in the pipe; None where this is an end that cannot tell.

    Takes no lock. The writing end tells only whether there is room for a page.
    """
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        return None
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def held_in(descriptor: int) -> InPipe:
    """What is in the pipe. Raises OSError; takes its lock."""
    answer = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    (size,) = struct.unpack("i", answer)
    slots = fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ) // PAGE_BYTES
    return InPipe(size, min(size, slots) * SLOT_BYTES)


def most_in_one() -> int:
    """What one pipe keeps at most."""
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/fs/pipe-max-size") as file:
        return max(int(file.read()), _MOST_BYTES) // PAGE_BYTES * SLOT_BYTES
    return _MOST_BYTES // PAGE_BYTES * SLOT_BYTES
