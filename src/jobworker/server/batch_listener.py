"""A TCP listener that accepts several connections in one turn of the event loop.

trio.SocketListener accepts one a turn. Where connections come faster than that, as in a flood on a
busy host, the kernel's queue of them grows to seconds, and honest clients stand in it.
What is in excess can only be told from the rest, and let go, once it has been accepted.
"""

import socket
from contextlib import suppress

import trio

A_TURN = 4
"""Together 1 to 2 ms with what each has done until its handshake begins: others wait for that."""


class BatchListener(trio.abc.Listener[trio.SocketStream]):
    """Listens on a socket that it takes over."""

    def __init__(self, listening: socket.socket) -> None:
        self._socket = listening
        self._inner = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        self._left = 0
        """How many may still be accepted in this turn."""

    async def accept(self) -> trio.SocketStream:
        """See trio.abc.Listener; but for one in `A_TURN`, it is no checkpoint."""
        if self._left:
            self._left -= 1
            with suppress(OSError):  # there is none, or a fault, which is met again below
                accepted, _ = self._socket.accept()
                return trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
        stream = await self._inner.accept()
        self._left = A_TURN - 1
        return stream

    async def aclose(self) -> None:
        """See trio.abc.AsyncResource."""
        await self._inner.aclose()
