"""The client against a server's session in memory: who gets which reply, and when."""

import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import cast

import pytest
import trio
from attrs import define, evolve, field
from trio.testing import wait_all_tasks_blocked

from jobworker.client.address import Address
from jobworker.client.calls import Calls
from jobworker.client.client import Client
from jobworker.client.dial import Connection
from jobworker.client.following import DELIVERY, WINDOW_BYTES, Following
from jobworker.client.rpc_connection import RpcConnection
from jobworker.errors import (
    ConnectionFailed,
    InvalidParams,
    JobworkerError,
    NotFound,
    ProtocolError,
    TooLarge,
)
from jobworker.model.job import JobId, JobRecord, JobSpec, JobStatus, Stream
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

    async def send(self, message: str) -> None:
        try:
            await self.out.send(message)
        except trio.BrokenResourceError:
            raise ConnectionFailed("cannot go on: the connection broke") from None

    async def receive(self) -> str | bytes:
        try:
            return await self.incoming.receive()
        except trio.EndOfChannel:
            raise ConnectionFailed("cannot go on: the connection broke") from None


@define(eq=False)
class Servers:
    """Dials connections in memory, each to the next of `plays`; nobody is there after the last."""

    plays: list[Callable[[Peer], Awaitable[None]]]
    say_that_they_end: bool = False

    async def dial(self, *, task_status: trio.TaskStatus[object]) -> None:
        if not self.plays:
            raise ConnectionFailed("cannot connect: nobody there")
        out, sent = trio.open_memory_channel[str](1000)
        to_client, incoming = trio.open_memory_channel[str | bytes](1000)
        task_status.started(Wire(out, incoming, self.say_that_they_end))
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


async def test_replies_reach_their_calls_in_any_order() -> None:
    found: dict[int, JobRecord] = {}

    async with connected() as (client, peer), trio.open_nursery() as nursery:

        async def ask(job: int) -> None:
            found[job] = await client.job(job).status()

        for job in (1, 2, 3):
            nursery.start_soon(ask, job)
        calls = [await peer.call() for _ in range(3)]
        for call in reversed(calls):
            assert isinstance(call.params, m.JobParams)
            peer.reply(call, evolve(RECORD, id=call.params.id))
    assert {job: record.id for job, record in found.items()} == {1: 1, 2: 2, 3: 3}


async def test_an_error_reply_is_raised_as_its_class() -> None:
    async with connected() as (client, peer), trio.open_nursery() as nursery:

        async def refuse() -> None:
            call = await peer.call()
            assert call.id is not None
            error = NotFound("cannot find job 9", remedy="look", data={"job": 9})
            peer.to_client.send_nowait(peer.session.error(call.id, error))

        nursery.start_soon(refuse)
        with pytest.raises(NotFound, match="cannot find job 9; look") as caught:
            await client.job(9).status()
        assert caught.value.data == {"job": 9}


async def test_call_in_a_cancelled_scope_is_not_made() -> None:
    asked = list[str]()

    async def play(peer: Peer) -> None:
        while True:
            call = await peer.call()
            asked.append(call.method.name)
            peer.reply(call, m.Removed(jobs=(JobId(7),), bytes=0))

    async with served(Servers([play])) as client:
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.run(SPEC)
        assert (await client.job(7).remove()).jobs == (7,)
    assert asked == ["job.remove"]


async def test_call_that_is_cancelled_before_its_turn_to_be_sent_is_not_made() -> None:
    sent, may_go_on = list[str](), trio.Event()

    class Line:
        """Takes a message, and nothing more for a while."""

        async def send(self, message: str) -> None:
            sent.append(json.loads(message)["method"])
            await may_go_on.wait()

    rpc = RpcConnection(cast(Connection, Line()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rpc.serve_writer)
        nursery.start_soon(rpc.call, "job.list", m.ListParams(), m.ListResult)
        await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as others:
                others.start_soon(rpc.call, "job.status", m.JobParams(id=JobId(7)), JobStatus)
                await wait_all_tasks_blocked()
                scope.cancel()
        nursery.start_soon(rpc.call, "volume.list", m.Nothing(), m.Volumes)
        may_go_on.set()
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sent == ["job.list", "volume.list"]
    assert len(rpc._pending) == 2


async def test_cancelling_a_call_abandons_only_its_wait() -> None:
    async with connected() as (client, peer):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.job(7).wait)
                abandoned = await peer.call()
                scope.cancel()
        peer.reply(abandoned, RECORD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.job(8).status)
            later = await peer.call()
            assert later.method.name == "job.status"
            peer.reply(later, RECORD)


async def test_a_subscription_that_nobody_took_is_ended() -> None:
    async with connected() as (client, peer):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(anext, client.job(7).output())
                abandoned = await peer.call()
                scope.cancel()
        peer.reply(abandoned, m.LogResult(subscription=1, offset=0))
        peer.output(1, 0, b"late")
        call = await peer.call()
        assert call.method.name == "job.unfollow"
        assert call.params == m.SubscriptionParams(subscription=1)


async def test_output_before_the_reply_is_kept() -> None:
    async with connected() as (client, peer):

        async def serve() -> None:
            call = await peer.call()
            peer.output(1, 0, b"first ")
            peer.output(1, 6, b"second")
            peer.reply(call, m.RunResult(job=RECORD, subscription=1))
            peer.end(1, 12)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            job = await client.run(SPEC, follow=True)
            assert job.record == RECORD
            with job.output() as output:
                data = [chunk.data async for chunk in output]
        assert data == [b"first ", b"second"]
        assert output.offset == 12
        assert output.record is not None
        assert output.record.state is State.COMPLETED
        await wait_all_tasks_blocked()
        with pytest.raises(trio.WouldBlock):  # an ended subscription needs no unfollow
            peer.sent.receive_nowait()


async def test_slow_consumer_delays_no_reply_and_is_granted_what_it_takes() -> None:
    async with connected() as (client, peer):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                call = await peer.call()
                assert isinstance(call.params, m.LogParams)
                assert call.params.delivery.encoding is m.Encoding.BINARY
                assert call.params.delivery.credit_bytes == WINDOW_BYTES
                peer.reply(call, m.LogResult(subscription=3, offset=0))

            nursery.start_soon(serve)
            output = await opened(client)
        piece = WINDOW_BYTES // 8
        for number in range(8):
            peer.output(3, number * piece, bytes(piece))
        async with trio.open_nursery() as nursery:  # nothing is taken yet, and a call passes
            nursery.start_soon(client.job(7).status)
            peer.reply(await peer.call(), RECORD)
        for _ in range(8):
            await anext(output)
        await wait_all_tasks_blocked()
        granted = 0
        while peer.sent.statistics().current_buffer_used:
            call = await peer.call()
            assert isinstance(call.params, m.CreditParams)
            granted += call.params.bytes
        # What was handed out last is not taken yet.
        assert WINDOW_BYTES // 2 <= granted < WINDOW_BYTES
        output.close()
        assert (await peer.call()).method.name == "job.unfollow"


async def test_what_has_come_can_be_taken_at_once_and_is_granted_anew() -> None:
    async with connected() as (client, peer):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                peer.reply(await peer.call(), m.LogResult(subscription=3, offset=0))

            nursery.start_soon(serve)
            output = await opened(client)
        assert output.receive_nowait() is None
        piece = WINDOW_BYTES // 8
        for number in range(7):
            peer.output(3, number * piece, bytes([number]) * piece)
        peer.end(3, 7 * piece)
        await wait_all_tasks_blocked()
        seen = [await anext(output)]
        while (chunk := output.receive_nowait()) is not None:
            seen.append(chunk)
        assert [chunk.data[0] for chunk in seen] == list(range(7))
        assert output.offset == 7 * piece
        assert output.record is None
        with pytest.raises(StopAsyncIteration):
            await anext(output)
        assert output.record is not None
        call = await peer.call()
        assert call.params == m.CreditParams(subscription=3, bytes=WINDOW_BYTES // 2)
        output.close()
        assert output.receive_nowait() is None


async def test_output_of_a_closed_subscription_is_dropped() -> None:
    async with connected() as (client, peer):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))

            nursery.start_soon(serve)
            (await opened(client)).close()
        assert (await peer.call()).method.name == "job.unfollow"
        peer.output(1, 0, b"late")
        peer.end(1, 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.job(7).status)
            peer.reply(await peer.call(), RECORD)
        assert client._calls._rpc is not None
        assert client._calls._rpc._inboxes == {}


async def test_output_that_the_server_could_not_send_raises_after_what_came() -> None:
    async with connected() as (client, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))
            peer.output(1, 0, b"abc")
            peer.end(1, 3, name="not_found", message="cannot read the output: it is gone")

        nursery.start_soon(serve)
        output = await opened(client)
        assert (await anext(output)).data == b"abc"
        with pytest.raises(NotFound, match="it is gone"):
            await anext(output)
        with pytest.raises(StopAsyncIteration):
            await anext(output)


async def test_lost_connection_wakes_everyone() -> None:
    failures: list[str] = []

    async with connected() as (client, peer):

        async def fail(name: str) -> None:
            if name == "wait":
                with pytest.raises(ConnectionFailed):
                    await client.job(7).wait()
            else:
                output = await opened(client)
                with pytest.raises(ConnectionFailed):
                    await anext(output)
            failures.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, "log")
            peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))
            nursery.start_soon(fail, "wait")
            await peer.call()
            peer.hang_up()
        assert sorted(failures) == ["log", "wait"]
        with pytest.raises(ConnectionFailed):
            await client.job(7).status()


async def test_a_server_that_breaks_the_protocol_is_left() -> None:
    async with connected() as (client, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            await peer.call()
            peer.to_client.send_nowait('{"jsonrpc":"2.0","id":99,"result":{}}')

        nursery.start_soon(serve)
        with pytest.raises(ProtocolError, match="no call with its id"):
            await client.job(7).status()


async def test_too_large_a_request_is_not_sent() -> None:
    async with connected() as (client, peer):
        spec = JobSpec(command=("x", *["a" * 100_000] * 11))
        with pytest.raises(TooLarge):
            await client.run(spec)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.WouldBlock):
            peer.sent.receive_nowait()


@pytest.mark.parametrize("command", ["ls -l", [], ["a\0b"], ["x" * 200_000]])
async def test_command_that_can_be_none_is_not_sent(command: str | list[str]) -> None:
    async with connected() as (client, peer):
        with pytest.raises(InvalidParams, match="cannot run"):
            await client.run(command)
        with pytest.raises(trio.WouldBlock):
            peer.sent.receive_nowait()


async def test_output_that_was_left_half_way_is_ended_with_the_next_message() -> None:
    async with connected() as (client, peer):

        async def serve() -> None:
            peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))
            peer.output(1, 0, b"first")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async for _ in client.job(7).output():
                break
        gc.collect()
        peer.output(1, 5, b"second")
        assert (await peer.call()).params == m.SubscriptionParams(subscription=1)
