"""A TCP listener that accepts several connections in one turn of the event loop.

trio.SocketListener accepts one in each turn. If connections come faster, as in a flood on a busy
host, the kernel's queue of them grows to seconds, and honest clients wait in it. The service can
recognize and close connections of a flood only after it has accepted them.
"""

import errno
import logging
import math
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

import trio

from jobworker.server.fairness.fair_scheduling import MAX_REST_SECONDS, ActiveClients

log = logging.getLogger("jobworker")

A_TURN = 4
"""The most connections accepted in one turn. With their work before the handshake, four take 1 to
2 ms, for which other tasks wait."""
TURN_SECONDS = 0.002
"""The time in a turn for connections that are closed at once: enough for a hundred whose peers have
closed already, or for ten of a flood."""
MANY_WAIT = 64
"""With so many connections in the kernel's queue rests are short: honest clients wait in it too."""
SHORT_REST_SECONDS = 0.002
SHORTAGES = {
    errno.EMFILE: "raise LimitNOFILE= of the service",
    errno.ENFILE: "raise the host's fs.file-max",
    errno.ENOMEM: "the kernel has no memory for it",
    errno.ENOBUFS: "the kernel has no memory for it",
}
"""The errors by which accept(2) fails though a connection waits, with a remedy for each."""
SHORTAGE_SECONDS = 0.1
TELL_SECONDS = 60.0
_UNACKED = slice(24, 28)
"""The place of tcpi_unacked in struct tcp_info."""


class BatchListener(trio.abc.Listener[trio.SocketStream]):
    """A listener that owns its socket; it closes a connection if `turn_away` returns True."""

    def __init__(
        self,
        listening: socket.socket,
        turn_away: Callable[[socket.socket], bool],
        active_clients: ActiveClients,
    ) -> None:
        self._socket = listening
        self._inner = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        self._turn_away, self._active_clients = turn_away, active_clients
        self._left = 0
        """How many may still be accepted in this turn."""
        self._began = self._told = -math.inf

    async def accept(self) -> trio.SocketStream:
        """See trio.abc.Listener. Only one call in `A_TURN` is a checkpoint."""
        while self._left and trio.current_time() < self._began + TURN_SECONDS:
            with suppress(OSError):  # none waits, or accept failed: the call below raises it again
                accepted, _ = self._socket.accept()
                if self._turn_away(accepted):
                    accepted.close()
                    continue
                self._left -= 1
                return trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
            break
        else:  # the turn is used up, and more may wait
            many = self._waiting() >= MANY_WAIT
            rest = SHORT_REST_SECONDS if many else MAX_REST_SECONDS
            await self._active_clients.rest_after(self._began, most_seconds=rest)
        stream = await self._accept()
        self._began = trio.current_time()
        self._left = A_TURN - 1
        return stream

    async def _accept(self) -> trio.SocketStream:
        while True:
            try:
                return await self._inner.accept()
            except OSError as fault:
                if fault.errno not in SHORTAGES:
                    raise
                if trio.current_time() >= self._told + TELL_SECONDS:
                    self._told = trio.current_time()
                    remedy = SHORTAGES[fault.errno]
                    log.warning("cannot accept connections: %s; %s", fault.strerror, remedy)
            await trio.sleep(SHORTAGE_SECONDS)

    def _waiting(self) -> int:
        """How many connections wait in the kernel's queue: tcpi_unacked of the socket, tcp(7)."""
        told = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKED.stop)
        return int.from_bytes(told[_UNACKED], sys.byteorder)

    async def aclose(self) -> None:
        """See trio.abc.AsyncResource."""
        await self._inner.aclose()
