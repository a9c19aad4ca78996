"""Send sd_notify(3) datagrams to the supervisor of this process, such as systemd.

All units of a host share one queue (/run/systemd/notify). Other units may have filled it, so after
a message that finds no room, the next one may still pass.

Standard library only: the launcher needs it too.
"""

import errno
import socket
import time
from enum import Enum, auto

PATIENCE_SECONDS = 2.0
"""How long `send` tries. The caller blocks for as long, so the time is short."""
AGAIN_SECONDS = 0.01
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)


class Outcome(Enum):
    """The result of an attempt to send a message."""

    SENT = auto()
    NO_ROOM = auto()
    NOBODY_LISTENS = auto()


def try_to_send(notify: socket.socket, message: str) -> Outcome:
    """Send a message on a connected socket without blocking. Raises nothing."""
    try:
        notify.send(message.encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError as error:
        return Outcome.NOBODY_LISTENS if error.errno in _GONE else Outcome.NO_ROOM
    return Outcome.SENT


def send(notify: socket.socket, message: str) -> None:
    """Send a message on a connected socket; try for up to PATIENCE_SECONDS. Raises nothing.

    The calling thread sleeps between two attempts.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while try_to_send(notify, message) is Outcome.NO_ROOM and time.monotonic() < until:
        time.sleep(AGAIN_SECONDS)
