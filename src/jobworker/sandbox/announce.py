"""Lines for the launcher's log, which never hold it up and never end it.

The log may be a pipe whose reader has stopped, a terminal that is held (Ctrl-S), or a file on a
full disk. A line for which there is no room at once is dropped, and the next one that finds room
tells how many were.

Standard library only.
"""

import contextlib
import os
import select

_LOG = 2
_MAX_LINE_BYTES = 2048
"""Below PIPE_BUF: a pipe that is writable takes that much at once; pipe(7)."""


class _Log:
    dropped = 0


def say(text: str) -> None:
    """Write a line to the log if it takes one now; raises nothing."""
    told = f" ({_Log.dropped} lines before this one were lost)" if _Log.dropped else ""
    line = f"launcher: {text}{told}".encode("utf-8", "replace")[:_MAX_LINE_BYTES] + b"\n"
    poll = select.poll()
    poll.register(_LOG, select.POLLOUT)
    with contextlib.suppress(OSError):
        events = poll.poll(0)
        if events and events[0][1] & select.POLLOUT:
            os.write(_LOG, line)
            _Log.dropped = 0
            return
    _Log.dropped += 1
