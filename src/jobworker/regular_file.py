"""Open or read a regular file without blocking, even if its path names a FIFO or a device instead.

open(2) of a FIFO blocks until another process opens the other end, and opening a device may have
any effect. O_NONBLOCK keeps open(2) from blocking, and has no effect on a regular file. A size has
a bound, since a wrong path may name the image of a disk.
"""

import codecs
import errno
import os
import stat
from pathlib import Path

TEXT_BYTES_MAX = 1 << 20
"""Far more than any configuration has."""


class NotText(ValueError):
    """A file is no UTF-8 text; the message says why."""


def open_regular(path: Path | str, flags: int, mode: int = 0o600, dir_fd: int | None = None) -> int:
    """Return a descriptor of the regular file at `path`, closed at exec.

    Raises OSError as open(2) does, EINVAL if the path names something else than a regular file, and
    EBUSY if another program holds a lease on the file (fcntl(2), F_SETLEASE): open would block.
    """
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # clients run on other systems, too
        flags |= getattr(os, name, 0)
    try:
        opened = os.open(path, flags, mode, dir_fd=dir_fd)
    except BlockingIOError as error:
        raise OSError(errno.EBUSY, "another program has a lease on it", str(path)) from error
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket, or a device without a driver
            raise
        raise OSError(errno.EINVAL, "it is not a regular file", str(path)) from None
    try:
        kind = os.fstat(opened).st_mode
        if not stat.S_ISREG(kind):
            what = "a directory" if stat.S_ISDIR(kind) else "not a regular file"
            raise OSError(errno.EINVAL, f"it is {what}", str(path))
    except OSError:
        os.close(opened)
        raise
    return opened


def read_regular(path: Path | str, most_bytes: int) -> bytes:
    """Read a whole regular file. Raises as `open_regular`, and EFBIG for more than `most_bytes`."""
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {most_bytes} bytes", str(path))
    return content


def read_text(path: Path | str, most_bytes: int = TEXT_BYTES_MAX) -> str:
    """Read a whole file of UTF-8 text. Raises as `read_regular`, and NotText."""
    return decoded(read_regular(path, most_bytes))


def decoded(content: bytes) -> str:
    """Decode the content of a text file; each line ends with LF alone. Raises NotText."""
    if content.startswith(codecs.BOM_UTF8):
        raise NotText("it begins with a byte order mark (BOM)")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise NotText("it is not UTF-8 text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
