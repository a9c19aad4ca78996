"""A client's WebSocket that sends output in frames which all its followers share.

trio-websocket makes a new frame of each message, and wsproto copies it. Output comes here in whole
frames (`protocol.frames`): the same objects that other connections send too. They go to the stream
as they are, many small frames together. The stream sends one piece at a time, so these frames never
mix with those of trio-websocket.
"""

from collections.abc import Sequence
from contextlib import suppress

import trio
import trio_websocket
from attrs import define
from wsproto.connection import ConnectionState

from jobworker.errors import ProtocolError, SendStalled
from jobworker.protocol.frames import Frame, frame_close
from jobworker.server.connections.http_head import PrefixStream
from jobworker.tls_stream import RECORD_BYTES

WHY_SECONDS = 0.3
"""The time for a client that broke the protocol to take the messages on their way and the frame."""


@define(eq=False)
class FramedSocket:
    """An open WebSocket connection."""

    _socket: trio_websocket.WebSocketConnection
    _stream: PrefixStream

    async def get_message(self) -> str | bytes:
        """Wait for the next message. Raises trio_websocket.ConnectionClosed."""
        return await self._socket.get_message()

    async def send_frames(self, frames: Sequence[Frame]) -> None:
        """Send messages one after the other. Raises ConnectionClosed.

        If it is cancelled, a frame may be cut off, and the connection can send nothing more.
        """
        if self._socket.closed:
            raise trio_websocket.ConnectionClosed(self._socket.closed)
        parts, small = [], bytearray()
        for start, payload in frames:
            small += start
            if len(payload) < RECORD_BYTES:  # a copy costs less than a record of its own
                small += payload
            else:
                parts += [small, payload]
                small = bytearray()
        await self._stream.send_all(*parts, small)

    async def aclose(self, code: int = 1000, reason: str | None = None) -> None:
        """Send a closing frame with this code and reason, and wait for the client's answer."""
        await self._socket.aclose(code, reason)

    async def say_why(self) -> None:
        """Send the closing frame that trio-websocket leaves out if the client broke the protocol.

        It then closes the stream with the code and the reason of wsproto in `closed`, while wsproto
        takes the connection for open: neither side has sent a closing frame.
        """
        why = self._socket.closed
        if why is None or self._socket._wsproto.state is not ConnectionState.OPEN:
            return
        reason = f"{ProtocolError.name}: {why.reason}"
        with (
            suppress(trio.BrokenResourceError, trio.ClosedResourceError, SendStalled),
            trio.move_on_after(WHY_SECONDS),
        ):
            await self._stream.send_all(frame_close(why.code, reason))

    async def ping(self) -> None:
        """Ping the client and wait for its answer. Raises ConnectionClosed.

        If it is cancelled, a frame may be cut off, and the connection can send nothing more.
        """
        await self._socket.ping()

    async def pong(self) -> None:
        """Send a pong that answers no ping. Raises ConnectionClosed.

        If it is cancelled, a frame may be cut off, and the connection can send nothing more.
        """
        await self._socket.pong()

    def take_small_frames(self) -> int:
        """See `FrameScanner.take_small`."""
        return self._stream.frames.take_small()

    @property
    def taken_bytes(self) -> int:
        """See `TLSStream.taken_bytes`."""
        return self._stream.taken_bytes

    @property
    def closed(self) -> trio_websocket.CloseReason | None:
        """Why the connection was closed; None while it is open."""
        return self._socket.closed
