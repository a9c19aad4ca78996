"""The client's WebSocket over a stream in memory: whatever pieces the bytes come in."""

from typing import cast

import pytest
import trio
import wsproto.events as ws
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType

from jobworker.client.websocket import BUFFER_BYTES, Closed, Violation, WebSocket
from jobworker.protocol.frames import frame_binary
from jobworker.tls_stream import TLSStream


@define(eq=False)
class Memory:
    """A stream: what is to be read, in pieces, and what was sent."""

    pieces: list[bytes]
    sent: bytearray = field(factory=bytearray)
    is_sending: bool = False

    async def receive_into(self, buffer: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        if not self.pieces:
            return 0
        piece = self.pieces.pop(0)
        taken, rest = piece[: len(buffer)], piece[len(buffer) :]
        if rest:
            self.pieces.insert(0, rest)
        buffer[: len(taken)] = taken
        return len(taken)

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += data

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def encoded(message: bytes) -> bytes:
    """A message in one frame, as the server makes it."""
    return b"".join(frame_binary(b"", message))


def websocket(memory: Memory) -> WebSocket:
    return WebSocket(cast(TLSStream, memory), Connection(ConnectionType.CLIENT), b"")


def frames_of(message: str | bytes, parts: int) -> bytes:
    """A message in so many frames; a whole binary one as the server makes it."""
    if isinstance(message, bytes) and parts == 1:
        return encoded(message)
    server = Connection(ConnectionType.SERVER)
    step = len(message) // parts + 1
    data = b""
    for number in range(parts):
        part = message[number * step : (number + 1) * step]
        last = number == parts - 1
        event: ws.Event = (
            ws.TextMessage(data=part, message_finished=last)
            if isinstance(part, str)
            else ws.BytesMessage(data=part, message_finished=last)
        )
        data += server.send(event)
    return data


MESSAGES = st.lists(
    st.tuples(st.text(max_size=40) | st.binary(max_size=300), st.integers(1, 3)), max_size=6
)


@given(messages=MESSAGES, cuts=st.lists(st.integers(1, 50), max_size=40), ping=st.booleans())
def test_messages_arrive_whole_and_in_order_however_they_are_cut(
    messages: list[tuple[str | bytes, int]], cuts: list[int], ping: bool
) -> None:
    data = b"".join(frames_of(message, parts) for message, parts in messages)
    if ping:
        data = Connection(ConnectionType.SERVER).send(ws.Ping(payload=b"are you there")) + data
    pieces = []
    for cut in cuts:
        pieces.append(data[:cut])
        data = data[cut:]
    memory = Memory([piece for piece in (*pieces, data) if piece])

    async def receive() -> None:
        socket = websocket(memory)
        for message, _ in messages:
            got = await socket.receive()
            assert (got if isinstance(got, str) else bytes(got)) == message
        with pytest.raises(Closed):
            await socket.receive()

    trio.run(receive)
    assert bool(memory.sent) == ping


async def test_message_may_be_larger_than_the_buffer() -> None:
    large = bytes(range(256)) * (BUFFER_BYTES // 100)
    data = encoded(b"small") + encoded(large) + encoded(b"end")
    socket = websocket(Memory([data[at : at + 100_000] for at in range(0, len(data), 100_000)]))
    for expected in (b"small", large, b"end"):
        got = await socket.receive()
        assert isinstance(got, memoryview)
        assert bytes(got) == expected


async def test_closing_frame_is_answered_and_told() -> None:
    bye = Connection(ConnectionType.SERVER).send(ws.CloseConnection(code=1001, reason="restart"))
    memory = Memory([bye])
    socket = websocket(memory)
    with pytest.raises(Closed) as closed:
        await socket.receive()
    assert (closed.value.code, closed.value.reason) == (1001, "restart")
    assert memory.sent
    with pytest.raises(Closed):
        await socket.send("too late")


async def test_ping_that_crosses_the_goodbye_does_not_break_it() -> None:
    server = Connection(ConnectionType.SERVER)
    crossed = server.send(ws.Ping(payload=b"there")) + b"".join(frame_binary(b"", b"output"))
    memory = Memory([crossed, server.send(ws.CloseConnection(code=1000))])
    socket = websocket(memory)
    with trio.fail_after(5):
        await socket.aclose()
    assert socket.closed.is_set()
    assert not memory.pieces
    with pytest.raises(Closed):
        await socket.receive()


@pytest.mark.parametrize(
    "data",
    [
        b"\xc2\x01x",  # a reserved bit
        b"\x83\x01x",  # an unknown opcode
        b"\x82\x7f" + (1 << 40).to_bytes(8, "big"),  # a terabyte
        b"\x80\x01x",  # a continuation of nothing
        b"\x81\x02\xc3\x28",  # text that is no UTF-8
        b"\x01\x01a" + encoded(b"in between"),
    ],
)
async def test_what_breaks_the_protocol_is_told(data: bytes) -> None:
    socket = websocket(Memory([data]))
    with pytest.raises(Violation):
        await socket.receive()
