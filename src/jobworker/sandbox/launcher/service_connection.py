"""The launcher's end of its connection to the service: requests in, replies and events out.

Nothing here blocks. Backpressure: if a service does not read its replies, its further requests stay
in its socket, so that it cannot fill the launcher's memory.

The launcher does not trust the service. `sandbox.protocol.operations` checks each request. A
request that does not parse or that carries descriptors ends the connection, since only a broken or
hostile service sends one. This module does not close such descriptors, because close(2) of one may
block (SO_LINGER). To close the socket may block too, since it may hold unread descriptors.
`Disposal` closes both in another process.

If a service is killed, the launcher still serves all requests that the service sent before,
although no reply can reach it. One of them may be the signal that a client asked for. The launcher
serves one request in a turn, since a start takes milliseconds.

Standard library only.
"""

import select
import socket
from collections.abc import Callable, Sequence

from jobworker.errors import ProtocolError
from jobworker.sandbox import channel
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.launcher.outbox import Outbox
from jobworker.sandbox.protocol.operations import parse
from jobworker.sandbox.protocol.requests import Request

Serve = Callable[[int, Request], None]
_GONE = (BrokenPipeError, ConnectionResetError)
"""The errors of send(2) if the service has gone. Its last requests may still be unread."""
Lost = Callable[[str, list[int]], None]
"""Called once when the connection has ended, with the reason ("" if the service has closed it) and
the descriptors that another process has to close."""


class ServiceConnection:
    """One connection, from its first message to its end."""

    def __init__(
        self, sock: socket.socket, event_loop: EventLoop, serve: Serve, lost: Lost
    ) -> None:
        sock.setblocking(False)
        self._sock, self._event_loop = sock, event_loop
        self._serve, self._lost = serve, lost
        self._outbox = Outbox(sock)
        self._awaits_room = self._is_full = False
        self.open = True
        event_loop.watch(sock.fileno(), self._on_ready)

    @property
    def is_at_its_end(self) -> bool:
        """Whether the service has gone. Its last requests may still be unread."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _on_ready(self) -> None:
        """Read and serve one request without blocking, if there is room for its reply."""
        strangers: list[int] = []
        try:
            self._flush()
            if self._is_full:
                return
            received = self._receive()
            if received is None:
                self._end("", [])
                return
            message, strangers = received
            if strangers:
                raise ProtocolError("cannot take the request: it carries descriptors")
            number, request = parse(message)
        except BlockingIOError:
            return
        except channel.BadMessage as error:
            self._end(str(error), error.descriptors)
            return
        except (ProtocolError, OSError) as error:
            self._end(str(error), strangers)
            return
        self._serve(number, request)

    def send(self, message: channel.Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message now or when there is room. Drop it if the connection has ended."""
        if not self.open:
            return
        try:
            self._outbox.send(message, descriptors)
        except _GONE:
            self._outbox.close()  # the last requests of the service are still served
        except OSError as error:
            self._end(str(error), [])
            return
        self._await_room()

    def _flush(self) -> None:
        try:
            self._outbox.flush()
        except _GONE:
            self._outbox.close()
        self._await_room()

    def _receive(self) -> tuple[channel.Message, list[int]] | None:
        try:
            return channel.receive(self._sock)
        except ConnectionResetError:  # reported once, before the requests that are still unread
            return channel.receive(self._sock)

    def mute(self) -> None:
        """Stop reading and sending. The socket stays open until the launcher exits."""
        self.open = False
        self._event_loop.unwatch(self._sock.fileno())

    def _await_room(self) -> None:
        """Have the event loop call when the socket is writable, if messages are queued."""
        state = self._outbox.waiting, self._outbox.is_full
        if state != (self._awaits_room, self._is_full):
            self._awaits_room, self._is_full = state
            self._event_loop.watch_writable(
                self._sock.fileno(), self._awaits_room, alone=self._is_full
            )

    def _end(self, reason: str, strangers: list[int]) -> None:
        self.open = False
        self._event_loop.unwatch(self._sock.fileno())
        self._outbox.close()
        self._lost(reason, [self._sock.detach(), *strangers])
