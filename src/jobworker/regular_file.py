"""Opening a file at whose place an operator may have left something else, without waiting for it.

open(2) of a FIFO waits until another process opens its other end, and opening a device may do
anything. O_NONBLOCK keeps open from waiting, and does nothing for a regular file.
"""

import errno
import os
import stat
from pathlib import Path


def open_regular(path: Path | str, flags: int, mode: int = 0o600, dir_fd: int | None = None) -> int:
    """Return a descriptor of the regular file at `path`, closed at exec.

    Raises OSError as open(2), with EINVAL where something else stands there, and with EBUSY where
    another program has a lease on the file (fcntl(2), F_SETLEASE), for which open would wait.
    """
    try:
        opened = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    except BlockingIOError as error:
        raise OSError(errno.EBUSY, "another program has a lease on it", str(path)) from error
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise OSError(errno.EINVAL, "something else than a file stands there", str(path))
    except OSError:
        os.close(opened)
        raise
    return opened
