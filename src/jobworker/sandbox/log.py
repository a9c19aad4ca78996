"""Lines for the launcher's log, which never hold it up and never end it.

The log may be a pipe whose reader has stopped, a terminal that is held (Ctrl-S), or a file on a
full disk. A line for which there is no room at once is dropped, and the next one that finds room
tells how many were.

poll(2) alone does not promise that a write returns: the service writes to the same log, and may
take the room in between. So the launcher opens the log once more (`open_log`), and that open file
description does not block. Where it cannot be opened, poll(2) has to do.

A regular file on a disk that hangs holds the launcher up all the same: poll(2) calls it writable,
O_NONBLOCK does nothing for it, and RWF_NOWAIT (pwritev2(2)) is refused by ext4.

Standard library only.
"""

import contextlib
import os
import select
import socket
import stat
import sys
import time
from types import TracebackType

_LOG = 2
_MAX_LINE_BYTES = 4000
"""Below PIPE_BUF: a pipe that is writable takes that much at once; pipe(7)."""


class _Log:
    dropped = 0
    own: int | None = None
    """The log once more, without waiting."""
    file = (0, 0)
    """Which file that is: a process made by the launcher may have closed its descriptor."""
    is_socket = False


def open_log() -> None:
    """Have what this process says never wait, and its uncaught exceptions said; raises nothing.

    Call it while /proc is there. O_NONBLOCK is not set on the log itself, which others share.
    """
    sys.excepthook = _say_exception
    with contextlib.suppress(OSError):
        status = os.fstat(_LOG)
        mode, _Log.file = status.st_mode, (status.st_dev, status.st_ino)
        _Log.is_socket = stat.S_ISSOCK(mode)
        if stat.S_ISFIFO(mode) or os.isatty(_LOG):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            _Log.own = os.open(f"/proc/self/fd/{_LOG}", flags)


def say(text: str, level: str = "WARNING") -> None:
    """Write a line to the log, as the service writes its own, if it takes one now.

    Raises nothing.
    """
    now = time.time()
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    _write(f"{moment}.{int(now * 1000) % 1000:03d}Z {level} launcher: {text}")


def say_last(text: str) -> None:
    """Say why a program cannot go on, in the form of its other last words; raises nothing."""
    _write(f"worker: {text}")


def say_fault(what: str) -> None:
    """Say the exception that is being handled, and where it came from; raises nothing."""
    kind, error, trace = sys.exc_info()
    if kind is not None and error is not None:
        say(what, "ERROR")
        _say_exception(kind, error, trace)


def _write(text: str) -> None:
    told = f" ({_Log.dropped} lines before this one were lost)" if _Log.dropped else ""
    line = f"{text}{told}".encode("utf-8", "replace")[:_MAX_LINE_BYTES] + b"\n"
    with contextlib.suppress(OSError):
        if _takes(line):
            _Log.dropped = 0
            return
    _Log.dropped += 1


def _takes(line: bytes) -> bool:
    if _has_own():
        assert _Log.own is not None
        return os.write(_Log.own, line) == len(line)
    poll = select.poll()
    poll.register(_LOG, select.POLLOUT)
    events = poll.poll(0)
    if not events or not events[0][1] & select.POLLOUT:
        return False
    if _Log.is_socket:
        with socket.socket(fileno=os.dup(_LOG)) as log:
            return log.send(line, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(line)
    os.write(_LOG, line)
    return True


def _has_own() -> bool:
    if _Log.own is None:
        return False
    try:
        status = os.fstat(_Log.own)
    except OSError:
        return False
    return _Log.file == (status.st_dev, status.st_ino)


def _say_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    say(f"{kind.__name__}: {error}", "ERROR")
    while trace is not None:
        code = trace.tb_frame.f_code
        say(f"    in {code.co_name}, {code.co_filename}, line {trace.tb_lineno}", "ERROR")
        trace = trace.tb_next
