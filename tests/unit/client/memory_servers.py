"""Servers in memory, to which clients connect."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import trio
from attrs import define, evolve, field
from trio.testing import wait_all_tasks_blocked

from jobworker.client.address import Address
from jobworker.client.calls import Calls
from jobworker.client.client import Client
from jobworker.client.following import DELIVERY, Following
from jobworker.client.silence import Traffic
from jobworker.errors import (
    ConnectionFailed,
    JobworkerError,
)
from jobworker.model.job import JobId, JobRecord, JobSpec, Stream
from jobworker.model.lifecycle import State
from jobworker.protocol import messages as m
from jobworker.protocol.frames import read_header
from jobworker.protocol.session import (
    RpcRequest,
    ServerSession,
    encode_output_end,
    frame_output,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPEC = JobSpec(command=("true",))
RECORD = JobRecord(id=JobId(7), spec=SPEC, owner="ann", state=State.RUNNING, created_at=NOW)


def payload_of(frame: bytes) -> bytes:
    """A message without the header of its frame."""
    header = read_header(memoryview(frame))
    assert header is not None
    assert header.whole_binary_message
    assert header.size == len(frame)
    return frame[header.header_bytes :]


@define(eq=False)
class Peer:
    """The server's end: what the client has sent, and what it is to receive."""

    sent: trio.MemoryReceiveChannel[str]
    to_client: trio.MemorySendChannel[str | bytes]
    session: ServerSession = field(factory=ServerSession)

    async def call(self) -> RpcRequest:
        """The client's next call."""
        received = self.session.receive(await self.sent.receive())
        assert isinstance(received, RpcRequest)
        return received

    def reply(self, call: RpcRequest, value: object) -> None:
        assert call.id is not None
        self.to_client.send_nowait(self.session.result(call.id, value))

    def output(self, subscription: int, offset: int, data: bytes) -> None:
        header = m.OutputHeader(
            subscription=subscription, stream=Stream.STDOUT, offset=offset, time=NOW
        )
        self.to_client.send_nowait(payload_of(b"".join(frame_output(header, data))))

    def end(self, subscription: int, offset: int, **error: str) -> None:
        end = m.OutputEnd(
            subscription=subscription,
            offset=offset,
            job=evolve(RECORD, state=State.COMPLETED),
            error=error or None,
        )
        self.to_client.send_nowait(encode_output_end(end))

    def hang_up(self) -> None:
        self.to_client.close()


@define(eq=False)
class Wire:
    """A connection in memory."""

    out: trio.MemorySendChannel[str]
    incoming: trio.MemoryReceiveChannel[str | bytes]
    is_ended: bool = False
    is_silent: bool = False
    """Whether it answers no ping, as a stopped service."""
    frames: int = 0
    goodbyes: int = 0

    @property
    def traffic(self) -> Traffic:
        return Traffic(frames=self.frames, received_bytes=0, sent_bytes=0, taken_bytes=0)

    async def ping(self) -> None:
        await trio.lowlevel.checkpoint()
        self.frames += not self.is_silent

    def silent(self, seconds: float) -> ConnectionFailed:
        return ConnectionFailed(f"cannot go on: the service does not answer for {seconds:.0f} s")

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.goodbyes += 1

    async def send(self, message: str) -> None:
        try:
            await self.out.send(message)
        except trio.BrokenResourceError:
            raise ConnectionFailed("cannot go on: the connection broke") from None

    async def receive(self) -> str | bytes:
        try:
            message = await self.incoming.receive()
            self.frames += 1
            return message
        except trio.EndOfChannel:
            raise ConnectionFailed("cannot go on: the connection broke") from None


@define(eq=False)
class Servers:
    """Dials connections in memory, each to the next of `plays`; nobody is there after the last."""

    plays: list[Callable[[Peer], Awaitable[None]]]
    say_that_they_end: bool = False
    silent: int = 0
    """How many connections from now on answer no ping."""

    async def dial(self, *, task_status: trio.TaskStatus[object]) -> None:
        if not self.plays:
            raise ConnectionFailed("cannot connect: nobody there")
        out, sent = trio.open_memory_channel[str](1000)
        to_client, incoming = trio.open_memory_channel[str | bytes](1000)
        task_status.started(Wire(out, incoming, self.say_that_they_end, self.silent > 0))
        self.silent -= 1
        await self.plays.pop(0)(Peer(sent, to_client))


@asynccontextmanager
async def served(servers: Servers, patience_seconds: float = 0) -> AsyncIterator[Client]:
    """A client of servers in memory."""
    calls = Calls(address=Address("host"), dial=servers.dial, patience_seconds=patience_seconds)
    raised: JobworkerError | None = None
    async with trio.open_nursery() as nursery:
        try:  # out of the nursery, which would wrap it
            await nursery.start(calls.serve)
            yield Client(calls=calls)
        except JobworkerError as error:
            raised = error
        await calls.aclose(goodbye=False)
        nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised


async def opened(client: Client) -> Following:
    """A subscription on the client's connection of the moment."""
    return await client._calls.open_following(m.LogParams(id=JobId(7), delivery=DELIVERY))


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Client, Peer]]:
    """A client that is never patient, and the other end of its only connection."""
    peers: list[Peer] = []

    async def play(peer: Peer) -> None:
        peers.append(peer)
        await trio.lowlevel.checkpoint()

    async with served(Servers([play])) as client:
        await wait_all_tasks_blocked()
        yield client, peers[0]
