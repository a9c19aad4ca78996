"""Sends messages to a reader that may be slow, without blocking: at once, or when there is room.

A message that finds no room in the socket is queued. Its descriptors are duplicated, since their
owner may close them meanwhile. A large reply travels in a memfd. If no descriptor is left for that,
the reply becomes a refusal: to end the connection would be worse, since jobs depend on it.

Backpressure: a reader that sends requests and does not read would fill this process with replies.
So the caller must take no further request while `is_full` is true; then further requests wait in
the socket's buffer. Events are queued in any case. With `MAX_UNSENT` messages in the queue `send`
fails, and the caller ends the connection. Each message is encoded once, so that its size is known.

Standard library only.
"""

import errno
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from jobworker.sandbox import channel

MAX_UNSENT = 10_000
ENOUGH_BYTES = 4 << 20
"""The size of the queue from which on it is full: tens of thousands of replies of the usual size.
"""
ENOUGH_DESCRIPTORS = channel.MAX_DESCRIPTORS
"""The number of queued descriptors from which on the queue is full, since jobs need the others."""
_NO_MEMORY_FILE = frozenset({errno.EMFILE, errno.ENFILE})
"""The errors for want of a descriptor. Only a large reply, which travels in a memfd, fails so."""


class _Unsent(NamedTuple):
    number: object
    """The number of the request that it answers; None for an event."""
    body: bytes
    descriptors: Sequence[int]


class Outbox:
    """The sending side of a non-blocking socket, with a queue of unsent messages."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unsent: deque[_Unsent] = deque()
        self._bytes = self._descriptors = 0
        """The size of the queued messages, and the number of their descriptors."""

    @property
    def waiting(self) -> bool:
        """Whether messages are queued: then call `flush` when the socket is writable."""
        return bool(self._unsent)

    @property
    def is_full(self) -> bool:
        """Whether the caller has to stop taking requests until `flush` has sent some messages."""
        return self._bytes >= ENOUGH_BYTES or self._descriptors >= ENOUGH_DESCRIPTORS

    def send(self, message: channel.Message, descriptors: Sequence[int]) -> None:
        """Send a message or queue it. The caller keeps its descriptors.

        Raises OSError if the reader has gone, or (ENOBUFS) if `MAX_UNSENT` messages are queued.
        """
        unsent = _Unsent(message.get("id"), channel.body_of(message), descriptors)
        if not self._unsent:
            try:
                self._send(unsent)
                return
            except BlockingIOError:
                pass
        if len(self._unsent) >= MAX_UNSENT:
            raise OSError(errno.ENOBUFS, "the reader does not read")
        kept: list[int] = []
        try:
            kept.extend(map(os.dup, descriptors))
        except OSError:  # no descriptor is left
            channel.close_all(kept)
            raise
        self._unsent.append(unsent._replace(descriptors=kept))
        self._bytes += len(unsent.body)
        self._descriptors += len(kept)

    def flush(self) -> None:
        """Send queued messages while there is room. Raises OSError if the reader has gone."""
        try:
            while self._unsent:
                self._send(self._unsent[0])
                self._let_go()
        except BlockingIOError:
            return

    def _send(self, unsent: _Unsent) -> None:
        number, body, descriptors = unsent
        try:
            channel.send_body(self._sock, body, descriptors)
        except OSError as error:
            if error.errno not in _NO_MEMORY_FILE or descriptors or number is None:
                raise
            told = {"step": "reply", "errno": error.errno, "detail": os.strerror(error.errno)}
            channel.send(self._sock, {"id": number, "error": told})

    def close(self) -> None:
        """Drop the queued messages and close their descriptors."""
        while self._unsent:
            self._let_go()

    def _let_go(self) -> None:
        _, body, descriptors = self._unsent.popleft()
        self._bytes -= len(body)
        self._descriptors -= len(descriptors)
        channel.close_all(descriptors)
