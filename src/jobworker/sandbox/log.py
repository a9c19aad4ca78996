"""Writes lines to the launcher's log without blocking and without raising.

The log may be a pipe whose reader has stopped, a terminal that is stopped (Ctrl-S), or a file on a
full disk. If the log has no room for a line at once, the line is dropped. The next line that is
written has the number of dropped ones.

poll(2) alone does not ensure that a write returns: the service writes to the same log, and may fill
it between poll(2) and write(2). So the launcher opens the log a second time (`open_log`), and this
open file description does not block. If it cannot be opened, the launcher uses poll(2).

A regular file on a disk that hangs blocks the launcher all the same: poll(2) reports it as
writable, O_NONBLOCK has no effect on it, and ext4 refuses RWF_NOWAIT (pwritev2(2)).

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
"""Below PIPE_BUF (4096): a pipe that is writable takes so many bytes at once, see pipe(7)."""


class _Log:
    dropped = 0
    own: int | None = None
    """A second descriptor of the log, which does not block."""
    file = (0, 0)
    """The device and inode of the log. A child of the launcher may have closed `own`, and its
    number may belong to another file."""
    is_socket = False


def open_log() -> None:
    """Open the log without blocking, and log uncaught exceptions from now on. Raises nothing.

    Call it while /proc is mounted. It does not set O_NONBLOCK on the log itself, because other
    processes share that open file description.
    """
    sys.excepthook = _say_exception
    with contextlib.suppress(OSError):
        status = os.fstat(_LOG)
        mode, _Log.file = status.st_mode, (status.st_dev, status.st_ino)
        _Log.is_socket = stat.S_ISSOCK(mode)
        if stat.S_ISFIFO(mode) or os.isatty(_LOG):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            _Log.own = os.open(f"/proc/self/fd/{_LOG}", flags)


def log_line(text: str, level: str = "WARNING") -> None:
    """Write a line to the log in the format of the service, or drop it. Raises nothing."""
    now = time.time()
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    _write(f"{moment}.{int(now * 1000) % 1000:03d}Z {level} launcher: {text}")


class BoundedLog:
    """Logs lines that another process can cause at any rate: at most `MOST_LINES` in a period.

    The first line of a later period has the number of lines that were left out.
    """

    MOST_LINES, PERIOD_SECONDS = 20, 60.0

    def __init__(self) -> None:
        self._began, self._lines = -self.PERIOD_SECONDS, 0

    def line(self, text: str, level: str = "WARNING") -> None:
        """Log a line, or leave it out. Raises nothing."""
        now = time.monotonic()
        left_out = max(0, self._lines - self.MOST_LINES)
        if now - self._began >= self.PERIOD_SECONDS:
            self._began, self._lines = now, 0
            if left_out:
                text = f"{text} ({left_out} lines like it were left out)"
        self._lines += 1
        if self._lines <= self.MOST_LINES:
            log_line(text, level)


def log_last_words(text: str) -> None:
    """Log why the program exits, in the format of `worker`'s error messages. Raises nothing."""
    _write(f"worker: {text}")


def log_exception(what: str) -> None:
    """Log the exception that is being handled, with its traceback. Raises nothing."""
    kind, error, trace = sys.exc_info()
    if kind is not None and error is not None:
        log_line(what, "ERROR")
        _say_exception(kind, error, trace)


def _write(text: str) -> None:
    dropped = f" ({_Log.dropped} lines before this one were lost)" if _Log.dropped else ""
    line = f"{text}{dropped}".encode("utf-8", "replace")[:_MAX_LINE_BYTES] + b"\n"
    with contextlib.suppress(OSError):
        if _is_written(line):
            _Log.dropped = 0
            return
    _Log.dropped += 1


def _is_written(line: bytes) -> bool:
    """Write `line` without blocking, and return whether the log took all of it."""
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
    log_line(f"{kind.__name__}: {error}", "ERROR")
    while trace is not None:
        code = trace.tb_frame.f_code
        log_line(f"    in {code.co_name}, {code.co_filename}, line {trace.tb_lineno}", "ERROR")
        trace = trace.tb_next
