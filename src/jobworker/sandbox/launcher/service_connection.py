"""The launcher's end of its connection to the service: requests in, replies and events out.

Nothing here waits. Requests of a service that does not take its replies stay in its socket until it
does, so that it cannot fill this process with them.

The service is taken for hostile: `sandbox.protocol.operations` checks what it sends, and a request
that does not parse or that carries descriptors ends the connection, since only a broken or hostile
service sends one. Descriptors that came along are handed on unclosed: closing them may block
(SO_LINGER), and so may closing the socket itself, which may hold more of them unread. `Disposal`
does both elsewhere.

What a service said before it was killed is served to the last request, though no reply reaches it:
the signal that it sent for a client, say, with the reason for it. Each request has a turn of its
own: a start takes milliseconds.

Standard library only.
"""

import select
import socket
from collections.abc import Callable, Sequence

from jobworker.errors import ProtocolError
from jobworker.sandbox import channel
from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.launcher.outbox import Outbox
from jobworker.sandbox.protocol.operations import parse
from jobworker.sandbox.protocol.requests import Request

Serve = Callable[[int, Request], None]
_GONE = (BrokenPipeError, ConnectionResetError)
"""Nobody reads what is sent any more; what the service said before may still wait to be read."""
Lost = Callable[[str, list[int]], None]
"""Told once, when the connection has ended: why ("" where the service merely went), and the
descriptors that are to be closed elsewhere."""


class ServiceLink:
    """One connection, from its first message to its end."""

    def __init__(self, sock: socket.socket, turns: Turns, serve: Serve, lost: Lost) -> None:
        sock.setblocking(False)
        self._sock, self._turns = sock, turns
        self._serve, self._lost = serve, lost
        self._outbox = Outbox(sock)
        self._awaits_room = self._is_full = False
        self.open = True
        turns.watch(sock.fileno(), self._on_ready)

    @property
    def is_at_its_end(self) -> bool:
        """Whether the service has gone, though its last words may not all have been taken yet."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _on_ready(self) -> None:
        """Take one request, if there is one and room for its reply."""
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
        """Send a message now or as soon as there is room; dropped where the connection ended."""
        if not self.open:
            return
        try:
            self._outbox.send(message, descriptors)
        except _GONE:
            self._outbox.close()  # its last words are heard all the same
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
        except ConnectionResetError:  # told once, and before what waits to be read
            return channel.receive(self._sock)

    def mute(self) -> None:
        """Take and send nothing more; the other side sees the end with this process's."""
        self.open = False
        self._turns.unwatch(self._sock.fileno())

    def _await_room(self) -> None:
        """Be woken when there is room again for what waits to be sent."""
        state = self._outbox.waiting, self._outbox.is_full
        if state != (self._awaits_room, self._is_full):
            self._awaits_room, self._is_full = state
            self._turns.watch_room(self._sock.fileno(), self._awaits_room, alone=self._is_full)

    def _end(self, reason: str, strangers: list[int]) -> None:
        self.open = False
        self._turns.unwatch(self._sock.fileno())
        self._outbox.close()
        self._lost(reason, [self._sock.detach(), *strangers])
