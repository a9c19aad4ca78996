"""Messages on their way to a reader that may be slow: sent at once, or kept until there is room.

The sender never waits. Descriptors of a message that is kept are duplicated, since their owner
may close them meanwhile. A large reply that finds no descriptor to travel in becomes a refusal: it
is no reason to end the connection, on which jobs' lives depend. A reader that does not read at all
is given up on after `MAX_UNSENT`.

Standard library only.
"""

import errno
import os
import socket
from collections import deque
from collections.abc import Sequence

from jobworker.sandbox import channel

MAX_UNSENT = 10_000
_NO_MEMORY_FILE = frozenset({errno.EMFILE, errno.ENFILE})
"""Why a large reply, which travels in a descriptor, cannot be sent; no small one fails so."""


class Outbox:
    """The sending side of a non-blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unsent: deque[tuple[channel.Message, list[int]]] = deque()

    @property
    def waiting(self) -> bool:
        """Whether `flush` is to be called once the socket is writable."""
        return bool(self._unsent)

    def send(self, message: channel.Message, descriptors: Sequence[int]) -> None:
        """Send a message or keep it; raises OSError where the reader is gone or does not read."""
        if not self._unsent:
            try:
                self._send(message, descriptors)
                return
            except BlockingIOError:
                pass
        if len(self._unsent) >= MAX_UNSENT:
            raise OSError(errno.ENOBUFS, "the reader does not read")
        kept: list[int] = []
        try:
            kept.extend(map(os.dup, descriptors))
        except OSError:  # no descriptor left
            channel.close_all(kept)
            raise
        self._unsent.append((message, kept))

    def flush(self) -> None:
        """Send what was kept, as far as there is room; raises OSError where the reader is gone."""
        try:
            while self._unsent:
                message, descriptors = self._unsent[0]
                self._send(message, descriptors)
                self._unsent.popleft()
                channel.close_all(descriptors)
        except BlockingIOError:
            return

    def _send(self, message: channel.Message, descriptors: Sequence[int]) -> None:
        try:
            channel.send(self._sock, message, descriptors)
        except OSError as error:
            if error.errno not in _NO_MEMORY_FILE or descriptors or "id" not in message:
                raise
            told = {"step": "reply", "errno": error.errno, "detail": os.strerror(error.errno)}
            channel.send(self._sock, {"id": message["id"], "error": told})

    def close(self) -> None:
        """Drop what was kept."""
        while self._unsent:
            channel.close_all(self._unsent.popleft()[1])
