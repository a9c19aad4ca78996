"""A WebSocket client that may break every rule: bytes and frames as they are written."""

import os
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from attrs import define

from jobworker.cli.worker.embedded_service import EmbeddedService

from ..integration.wire import context_for

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Protocol: jobworker.v1\r\n"
)

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def frame(opcode: int, payload: bytes, *, first: int = 0x80, masked: bool = True) -> bytes:
    """A frame; `first` is what stands beside the opcode: FIN and the reserved bits."""
    size = len(payload)
    flag = 0x80 if masked else 0
    if size < 126:
        length = bytes([flag | size])
    elif size < 65_536:
        length = bytes([flag | 126]) + struct.pack("!H", size)
    else:
        length = bytes([flag | 127]) + struct.pack("!Q", size)
    mask = b"\0\0\0\0" if masked else b""  # a mask of zeroes leaves the payload as it is
    return bytes([first | opcode]) + length + mask + payload


async def dial(
    service: EmbeddedService, source: str = "127.0.0.1", buffer: int | None = None
) -> trio.SocketStream:
    """A TCP connection from an address of this host, which takes little where `buffer` is small."""
    host, port = service.address.rsplit(":", 1)
    socket = trio.socket.socket()
    try:
        if buffer is not None:
            socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, buffer)
        await socket.bind((source, 0))
        await socket.connect((host, int(port)))
    except BaseException:
        socket.close()
        raise
    return trio.SocketStream(socket)


def over_tls(
    service: EmbeddedService, tcp: trio.SocketStream, context: ssl.SSLContext | None = None
) -> "trio.SSLStream[trio.SocketStream]":
    """TLS on top of it, with the admin's certificate."""
    host = service.address.rsplit(":", 1)[0]
    return trio.SSLStream(
        tcp, context or context_for(service), server_hostname=host, https_compatible=True
    )


async def rest(stream: trio.abc.ReceiveStream) -> bytes:
    """What comes until the other end has closed, in whatever way."""
    said = b""
    try:
        while data := await stream.receive_some(65_536):
            said += bytes(data)
    except trio.BrokenResourceError:
        pass
    return said


@define
class Frame:
    """A frame from the server."""

    opcode: int
    payload: bytes

    @property
    def code(self) -> int:
        """Of a closing frame; 0 where it has none."""
        return int(struct.unpack("!H", self.payload[:2])[0]) if len(self.payload) > 1 else 0


class Raw:
    """An upgraded connection."""

    def __init__(self, stream: "trio.SSLStream[trio.SocketStream]", head: bytes) -> None:
        self.stream = stream
        self.head, _, self._rest = head.partition(b"\r\n\r\n")

    async def send(self, data: bytes) -> None:
        """Send bytes; a server that has closed is no fault of the caller's."""
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError:
            return

    async def _take(self, count: int) -> bytes:
        while len(self._rest) < count:
            try:
                data = bytes(await self.stream.receive_some(65_536))
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise EOFError
            self._rest += data
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    async def receive(self) -> Frame:
        """The next frame. Raises EOFError."""
        first, size = await self._take(2)
        if size == 126:
            (size,) = struct.unpack("!H", await self._take(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self._take(8))
        return Frame(first & 15, await self._take(size))

    async def closing(self) -> Frame | None:
        """The closing frame, past whatever comes before; None where the end came without one."""
        try:
            while (found := await self.receive()).opcode != CLOSE:
                pass
        except EOFError:
            return None
        return found


@asynccontextmanager
async def open_raw(
    service: EmbeddedService, extra: bytes = b"", buffer: int | None = None
) -> AsyncIterator[Raw]:
    """Connect and upgrade, with more header lines if wanted."""
    stream = over_tls(service, await dial(service, buffer=buffer))
    try:
        await stream.send_all(UPGRADE + extra + b"\r\n")
        head = b""
        while b"\r\n\r\n" not in head:
            data = await stream.receive_some(65_536)
            if not data:
                break
            head += bytes(data)
        yield Raw(stream, head)
    finally:
        await trio.aclose_forcefully(stream)


def soak(usual: int, full: int) -> int:
    """How many of something: all of them only where a long run is asked for."""
    return full if os.environ.get("JOBWORKER_SOAK") else usual
