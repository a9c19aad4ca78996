"""A client's WebSocket, played: what it sends comes from a test, and what it is sent is kept."""

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

import trio
from attrs import define, field
from trio_websocket import CloseReason, ConnectionClosed

from jobworker.pki.identity import Identity
from jobworker.protocol.frames import Frame, read_header
from jobworker.server.access.connected_clients import ConnectedClient, PeerCertificates
from jobworker.server.connections.framed_socket import FramedSocket

PEER, NAME = "127.0.0.1:1", "alice"


def client(role: str = "admin") -> ConnectedClient:
    """An open connection."""
    identity = Identity(
        common_name=NAME, role=role, serial="01", not_after=datetime(2030, 1, 1, tzinfo=UTC)
    )
    return ConnectedClient(identity, PeerCertificates({}, ()), PEER)


def _text_of(frame: Frame) -> str:
    whole = b"".join(frame)
    header = read_header(memoryview(whole))
    assert header is not None
    assert header.size == len(whole)
    return whole[header.header_bytes :].decode()


@define(eq=False)
class PlayedSocket:
    """In place of `FramedSocket`."""

    sent: list[str] = field(factory=list)
    """The messages that the client has taken."""
    closing: list[tuple[int, str | None]] = field(factory=list)
    """The closing frames that it was sent."""
    closed: CloseReason | None = None
    taken_bytes: int = 0
    small_frames: int = 0
    takes: trio.Event = field(factory=trio.Event)
    """Whether the client takes messages: until then each send waits."""
    fault: Exception | None = None
    """What each send raises."""
    answers_closing: bool = True
    cut_off: int = 0
    """How many messages were cancelled while they were being sent."""
    _to_server: trio.MemorySendChannel[str] = field(init=False)
    _from_client: trio.MemoryReceiveChannel[str] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._to_server, self._from_client = trio.open_memory_channel[str](math.inf)
        self.takes.set()

    @property
    def framed(self) -> FramedSocket:
        """This, as the server has it."""
        return cast(FramedSocket, self)

    # --- the client's side ------------------------------------------------------------------

    def say(self, method: str, id_: object = None, **params: object) -> None:
        """Send a call, or a notification without an id."""
        body = {"jsonrpc": "2.0", "method": method, "params": params}
        self.say_text(json.dumps(body if id_ is None else {**body, "id": id_}))

    def say_text(self, message: str) -> None:
        """Send a message."""
        self._to_server.send_nowait(message)

    def close(self, code: int = 1000) -> None:
        """Close the connection."""
        self.closed = CloseReason(code, "")
        self._to_server.close()

    @property
    def unread(self) -> int:
        """How many messages the server has not read."""
        return self._from_client.statistics().current_buffer_used

    def replies(self) -> dict[object, dict[str, Any]]:
        """The replies, by the ids of the calls."""
        bodies = [json.loads(text) for text in self.sent]
        return {body["id"]: body for body in bodies if "id" in body}

    # --- the server's side ------------------------------------------------------------------

    async def get_message(self) -> str:
        try:
            return await self._from_client.receive()
        except trio.EndOfChannel:
            raise ConnectionClosed(self.closed) from None

    async def send_frames(self, frames: Sequence[Frame]) -> None:
        await trio.lowlevel.checkpoint()
        if self.fault is not None:
            raise self.fault
        for frame in frames:
            try:
                await self.takes.wait()
            except trio.Cancelled:
                self.cut_off += 1
                raise
            self.sent.append(_text_of(frame))

    async def aclose(self, code: int, reason: str | None) -> None:
        await trio.lowlevel.checkpoint()
        self.closing.append((code, reason))
        if not self.answers_closing:
            await trio.sleep_forever()

    async def ping(self) -> None:
        await trio.lowlevel.checkpoint()

    def take_small_frames(self) -> int:
        taken, self.small_frames = self.small_frames, 0
        return taken
