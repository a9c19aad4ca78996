"""Open a regular file without blocking, even where its path names a FIFO or a device instead.

open(2) of a FIFO blocks until another process opens the other end, and opening a device may have
any effect. O_NONBLOCK keeps open(2) from blocking, and has no effect on a regular file.
"""

import errno
import os
import stat
from pathlib import Path


def open_regular(path: Path | str, flags: int, mode: int = 0o600, dir_fd: int | None = None) -> int:
    """Return a descriptor of the regular file at `path`, closed at exec.

    Raises OSError as open(2) does, EINVAL if the path names something else than a regular file, and
    EBUSY if another program holds a lease on the file (fcntl(2), F_SETLEASE): open would block.
    """
    try:
        opened = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    except BlockingIOError as error:
        raise OSError(errno.EBUSY, "another program has a lease on it", str(path)) from error
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    except OSError:
        os.close(opened)
        raise
    return opened
