"""Messages to whoever supervises a process: the datagrams of sd_notify(3).

systemd has one queue for all units of the host (/run/systemd/notify). So others may have filled it,
and one message that finds no room there says nothing about the next.

Standard library only: the launcher needs it too.
"""

import errno
import socket
import time
from enum import Enum, auto

PATIENCE_SECONDS = 2.0
"""For what is told once. Whatever comes next waits meanwhile, so it is short."""
AGAIN_SECONDS = 0.01
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)


class Outcome(Enum):
    """What became of a message."""

    SENT = auto()
    NO_ROOM = auto()
    NOBODY_LISTENS = auto()


def try_to_send(notify: socket.socket, message: str) -> Outcome:
    """Send a message by a connected socket where there is room for it. Raises nothing."""
    try:
        notify.send(message.encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError as error:
        return Outcome.NOBODY_LISTENS if error.errno in _GONE else Outcome.NO_ROOM
    return Outcome.SENT


def send(notify: socket.socket, message: str) -> None:
    """Send a message by a connected socket, and try so for PATIENCE_SECONDS. Raises nothing.

    Nothing else is served meanwhile.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while try_to_send(notify, message) is Outcome.NO_ROOM and time.monotonic() < until:
        time.sleep(AGAIN_SECONDS)
