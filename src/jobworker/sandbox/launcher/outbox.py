"""Messages on their way to a reader that may be slow: sent at once, or kept until there is room.

The sender never waits. Descriptors of a message that is kept are duplicated, since their owner
may close them meanwhile. A large reply that finds no descriptor to travel in becomes a refusal: it
is no reason to end the connection, on which jobs' lives depend.

A reader that asks and does not read would fill this process with replies. Whoever serves it is to
take no further request while `is_full`: then the sockets hold the rest. What is sent without a
request is kept all the same, and a reader is given up on after `MAX_UNSENT`. A message is encoded
once, so that its size is known.

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
"""Of replies that are kept: tens of thousands of the usual ones."""
ENOUGH_DESCRIPTORS = channel.MAX_DESCRIPTORS
"""Kept for them: jobs need the rest."""
_NO_MEMORY_FILE = frozenset({errno.EMFILE, errno.ENFILE})
"""Why a large reply, which travels in a descriptor, cannot be sent; no small one fails so."""


class _Unsent(NamedTuple):
    number: object
    """Of the request that it answers; None where it answers none."""
    body: bytes
    descriptors: Sequence[int]


class Outbox:
    """The sending side of a non-blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unsent: deque[_Unsent] = deque()
        self._bytes = self._descriptors = 0
        """Of those that are kept."""

    @property
    def waiting(self) -> bool:
        """Whether `flush` is to be called once the socket is writable."""
        return bool(self._unsent)

    @property
    def is_full(self) -> bool:
        """Whether nothing more is to be asked for until some of it was sent."""
        return self._bytes >= ENOUGH_BYTES or self._descriptors >= ENOUGH_DESCRIPTORS

    def send(self, message: channel.Message, descriptors: Sequence[int]) -> None:
        """Send a message or keep it; raises OSError where the reader is gone or does not read."""
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
        except OSError:  # no descriptor left
            channel.close_all(kept)
            raise
        self._unsent.append(unsent._replace(descriptors=kept))
        self._bytes += len(unsent.body)
        self._descriptors += len(kept)

    def flush(self) -> None:
        """Send what was kept, as far as there is room; raises OSError where the reader is gone."""
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
        """Drop what was kept."""
        while self._unsent:
            self._let_go()

    def _let_go(self) -> None:
        _, body, descriptors = self._unsent.popleft()
        self._bytes -= len(body)
        self._descriptors -= len(descriptors)
        channel.close_all(descriptors)
