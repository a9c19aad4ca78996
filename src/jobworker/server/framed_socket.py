"""A client's WebSocket on which output goes out in frames that were made once for everybody.

trio-websocket makes a frame of each message, and wsproto copies it on the way. What is no text here
is a whole frame already (`protocol.frames`), the very object that other connections send too, and
goes to the stream as it is. The stream sends one thing at a time, so frames never mix with those
of trio-websocket.
"""

import trio_websocket
from attrs import define

from jobworker.protocol.frames import Frame
from jobworker.server.http_head import PrefixStream


@define(eq=False)
class FramedSocket:
    """An open connection."""

    _socket: trio_websocket.WebSocketConnection
    _stream: PrefixStream

    async def get_message(self) -> str | bytes:
        """Wait for the next message. Raises trio_websocket.ConnectionClosed."""
        return await self._socket.get_message()

    async def send_message(self, message: str | Frame) -> None:
        """Send a text message, or a frame. Raises as `get_message`; breaks if cancelled."""
        if isinstance(message, str):
            await self._socket.send_message(message)
        elif self._socket.closed:
            raise trio_websocket.ConnectionClosed(self._socket.closed)
        else:
            await self._stream.send_all(*message)

    async def aclose(self, code: int = 1000, reason: str | None = None) -> None:
        """Say goodbye and close."""
        await self._socket.aclose(code, reason)

    async def ping(self) -> None:
        """Ping the client and wait for its answer. Raises as `get_message`; breaks if cancelled."""
        await self._socket.ping()

    @property
    def taken_bytes(self) -> int:
        """See `TLSStream.taken_bytes`."""
        return self._stream.taken_bytes

    @property
    def closed(self) -> trio_websocket.CloseReason | None:
        """Why the connection was closed; None while it is open."""
        return self._socket.closed
