"""The client's side of a WebSocket connection (RFC 6455) over a TLS stream; only user of wsproto.

One task receives, any number send. A whole binary message is returned as a view of the receive
buffer, valid until the next call: it is not copied, so a large one costs only its decryption. All
other frames go through wsproto (see `protocol.frames`).

`receive` answers pings and closing frames, so one task should always be in it. It does not wait for
another task's message to be sent, which may take long while the server reads nothing; that task
then sends the answer to the ping.
"""

from collections import deque
from contextlib import suppress

import trio
import wsproto.events as ws
from attrs import define, field, frozen
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.handshake import H11Handshake
from wsproto.utilities import ProtocolError

from jobworker.client.silence import Traffic
from jobworker.protocol.frames import FrameHeader, read_header
from jobworker.tls_stream import TLSStream

BUFFER_BYTES = 1 << 20
LARGE_BYTES = 65_536
MAX_MESSAGE_BYTES = 16 << 20
MAX_FRAGMENTS = 16_384
MAX_HEAD_BYTES = 65_536
MAX_BODY_BYTES = 65_536
LOST = 1006
"""RFC 6455, section 7.4.1: no closing frame was received."""


class Closed(Exception):
    """No message follows. Has the code and reason of the closing frame; LOST without a frame."""

    def __init__(self, code: int = LOST, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


class Violation(Exception):
    """The server violates the protocol."""


@frozen
class Rejected(Exception):
    """The server answered the upgrade with an HTTP status instead of a WebSocket."""

    status: int
    body: bytes


async def upgrade(stream: TLSStream, host: str, subprotocol: str) -> "WebSocket":
    """Upgrade the stream to a WebSocket with `subprotocol`.

    Raises Rejected, Violation, Closed if the server closes the stream without a response, and
    trio.BrokenResourceError if the stream breaks.
    """
    handshake = H11Handshake(ConnectionType.CLIENT)
    request = ws.Request(host=host, target="/", subprotocols=[subprotocol])
    await stream.send_all(handshake.send(request))
    raw = b""
    while b"\r\n\r\n" not in raw:
        raw += await _receive(stream)
        if not raw.startswith(b"HTTP/1."[: len(raw)]) or len(raw) > MAX_HEAD_BYTES:
            raise Violation("it does not answer a WebSocket request")
    head, _, rest = raw.partition(b"\r\n\r\n")
    events = _events(handshake, head + b"\r\n\r\n")
    answer = events[0] if events else None
    if isinstance(answer, ws.AcceptConnection):
        if answer.subprotocol != subprotocol:
            raise Violation(f"it does not speak {subprotocol}")
        assert handshake.connection is not None
        return WebSocket(stream, handshake.connection, rest)
    if isinstance(answer, ws.RejectConnection):
        raise Rejected(answer.status_code, await _body(stream, handshake, events[1:], rest))
    raise Violation("it does not answer a WebSocket request")


async def _body(
    stream: TLSStream, handshake: H11Handshake, events: list[ws.Event], data: bytes
) -> bytes:
    body = b""
    with suppress(Closed, trio.BrokenResourceError, Violation):
        events += _events(handshake, data)
        while len(body) < MAX_BODY_BYTES:
            for event in events:
                if isinstance(event, ws.RejectData):
                    body += event.data
                    if event.body_finished:
                        return body
            events = _events(handshake, await _receive(stream))
    return body


def _events(handshake: H11Handshake, data: bytes) -> list[ws.Event]:
    try:
        handshake.receive_data(data)
    except ProtocolError as error:
        raise Violation(str(error)) from None
    return list(handshake.events())


async def _receive(stream: TLSStream) -> bytes:
    data = await stream.receive_some()
    if not data:
        raise Closed
    return data


@define(eq=False)
class WebSocket:
    """An open connection: whole messages in both directions, in order."""

    _stream: TLSStream
    _protocol: Connection
    _rest: bytes
    """The bytes received after the server's response to the upgrade."""
    _buffer: bytearray = field(factory=lambda: bytearray(BUFFER_BYTES), init=False)
    _start: int = field(default=0, init=False)
    _end: int = field(default=0, init=False)
    closed: trio.Event = field(factory=trio.Event, init=False)
    """Set once the connection is closed on this side."""
    _whole: deque[str | bytes] = field(factory=deque, init=False)
    _parts: list[str | bytes] = field(factory=list, init=False)
    _parts_size: int = field(default=0, init=False)
    _ended: Closed | None = field(default=None, init=False)
    _frames: int = field(default=0, init=False)
    """Whole frames received so far."""
    _pong: ws.Pong | None = field(default=None, init=False)
    """The answer to the last ping, if it was not sent yet: RFC 6455, section 5.5.3."""
    _receiving: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._buffer[: len(self._rest)] = self._rest
        self._end = len(self._rest)

    async def send(self, text: str) -> None:
        """Send a text message. Raises Closed. A cancellation breaks the connection."""
        if self._ended is not None or self._protocol.state is not ConnectionState.OPEN:
            raise Closed(*(self._ended.args if self._ended else ()))
        await self._send(ws.TextMessage(data=text))

    async def ping(self) -> None:
        """Send a ping, whose answer `receive` takes as a frame. Raises Closed."""
        if self._ended is not None or self._protocol.state is not ConnectionState.OPEN:
            raise Closed(*(self._ended.args if self._ended else ()))
        await self._send(ws.Ping())

    @property
    def traffic(self) -> Traffic:
        """What has passed over this connection so far."""
        stream, taken_bytes = self._stream, 0
        with suppress(trio.ClosedResourceError, OSError):
            taken_bytes = stream.taken_bytes
        return Traffic(
            frames=self._frames,
            received_bytes=stream.received_bytes,
            sent_bytes=stream.sent_bytes,
            taken_bytes=taken_bytes,
        )

    async def _send(self, event: ws.Event) -> None:
        try:
            await self._stream.send_all(self._protocol.send(event))
            while self._pong is not None and self._protocol.state is ConnectionState.OPEN:
                pong, self._pong = self._pong, None
                await self._stream.send_all(self._protocol.send(pong))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Closed from None

    async def receive(self) -> str | bytes | memoryview:
        """Wait for the next message; a view is valid until the next call.

        Raises Closed at the end, Violation, and trio.BrokenResourceError.
        """
        self._receiving = True
        try:
            while not self._whole:
                if self._ended is not None:
                    raise Closed(*self._ended.args)
                view = memoryview(self._buffer)[self._start : self._end]
                header = read_header(view)
                if header is None or len(view) < header.size:
                    await self._read_more(header)
                    continue
                self._start += header.size
                self._frames += 1
                if header.whole_binary_message and not self._parts:
                    return view[header.header_bytes : header.size]
                await self._take(bytes(view[: header.size]))
            return self._whole.popleft()
        finally:
            self._receiving = False

    async def _read_more(self, header: FrameHeader | None) -> None:
        if header is not None and header.payload_bytes > MAX_MESSAGE_BYTES:
            raise Violation(f"a message of {header.payload_bytes} bytes")
        wanted = header.size if header is not None else 2
        if self._start + max(wanted, self._end - self._start + 1) > len(self._buffer):
            rest = self._buffer[self._start : self._end]
            if wanted > len(self._buffer):
                self._buffer = bytearray(wanted + BUFFER_BYTES)
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        elif self._start == self._end:
            self._start = self._end = 0
        view = memoryview(self._buffer)[self._end :]
        if header is not None and header.size >= LARGE_BYTES:  # read no bytes of the next frame
            view = view[: self._start + header.size - self._end]
        count = await self._stream.receive_into(view)
        if not count:
            self._ended = Closed()
        self._end += count

    async def _take(self, frame: bytes) -> None:
        """Pass a frame to wsproto, and handle the events that it returns."""
        try:
            self._protocol.receive_data(frame)
            events = list(self._protocol.events())
        except ProtocolError as error:
            raise Violation(str(error)) from None
        for event in events:
            match event:
                case ws.TextMessage() | ws.BytesMessage():
                    self._take_part(event)
                case ws.Ping():
                    if self._protocol.state is not ConnectionState.OPEN:  # no pong may follow
                        continue
                    if self._stream.is_sending:
                        self._pong = event.response()
                    else:
                        await self._send(event.response())
                case ws.CloseConnection():
                    if self._protocol.state is ConnectionState.OPEN:  # from wsproto, not a frame
                        raise Violation(event.reason or "a bad frame")
                    self._ended = Closed(int(event.code), event.reason or "")
                    if self._protocol.state is ConnectionState.REMOTE_CLOSING:
                        with suppress(Closed):
                            await self._send(event.response())
                case _:
                    pass

    def _take_part(self, event: ws.TextMessage | ws.BytesMessage) -> None:
        self._parts.append(event.data if isinstance(event.data, str) else bytes(event.data))
        self._parts_size += len(event.data)
        if self._parts_size > MAX_MESSAGE_BYTES or len(self._parts) > MAX_FRAGMENTS:
            raise Violation("a message without end")
        if event.message_finished:
            parts, self._parts, self._parts_size = self._parts, [], 0
            empty = "" if isinstance(parts[0], str) else b""
            self._whole.append(empty.join(parts))  # type: ignore[arg-type] # all of one kind

    async def aclose(self) -> None:
        """Send a closing frame, wait for the server's (the caller bounds the time), and close."""
        try:
            if self._ended is None and self._protocol.state is ConnectionState.OPEN:
                await self._send(ws.CloseConnection(code=1000))
                while not self._receiving:  # otherwise, the task in `receive` handles the rest
                    await self.receive()
        except (Closed, Violation, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.closed.set()
            await self._stream.aclose()
