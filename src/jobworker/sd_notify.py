"""Messages to whoever supervises a process: the datagrams of sd_notify(3).

systemd has one queue for all units of the host (/run/systemd/notify). So others may have filled it,
and one message that finds no room there says nothing about the next.

Standard library only: the launcher needs it too.
"""

import errno
import socket
import time

PATIENCE_SECONDS = 2.0
"""For what is told once. Nothing else is served meanwhile, so it is short."""
_AGAIN_SECONDS = 0.01
_GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)


def send(notify: socket.socket, message: str, seconds: float) -> bool:
    """Send a message by a connected socket, and try so long; returns False if nobody listens.

    True says no more than that the next message may arrive. Raises nothing.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            notify.send(message.encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno in _GONE:
                return False
        else:
            return True
        if time.monotonic() >= until:
            return True
        time.sleep(_AGAIN_SECONDS)
