"""A TLS stream between two ends of this process: order, ends, turns and faults."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
import trustme

from jobworker.tls_stream import RECORD_BYTES, TLSStream

Contexts = tuple[ssl.SSLContext, ssl.SSLContext]
LARGE = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    """A server's and a client's."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.num_tickets = 0
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    return server, client


@asynccontextmanager
async def ends(contexts: Contexts) -> AsyncIterator[tuple[TLSStream, TLSStream]]:
    """A server's and a client's end, before the handshake."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        near = trio.socket.socket()
        await near.connect(listener.socket.getsockname())
        far = await listener.accept()
    server = TLSStream(far, contexts[0], server_side=True)
    client = TLSStream(trio.SocketStream(near), contexts[1], server_name="localhost")
    async with server, client:
        yield server, client


@asynccontextmanager
async def pair(contexts: Contexts) -> AsyncIterator[tuple[TLSStream, TLSStream]]:
    """The same, after the handshake."""
    async with ends(contexts) as (server, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.do_handshake)
            nursery.start_soon(client.do_handshake)
        yield server, client


async def exactly(stream: TLSStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await stream.receive_some()
        assert piece, f"the end after {len(data)} bytes"
        data += piece
    return bytes(data)


async def test_parts_of_one_message_arrive_in_order(contexts: Contexts) -> None:
    async with pair(contexts) as (server, client), trio.open_nursery() as nursery:
        nursery.start_soon(server.send_all, LARGE, bytearray(b"second"), memoryview(b"third"))
        assert await exactly(client, len(LARGE) + 11) == LARGE + b"secondthird"


async def test_messages_of_several_tasks_do_not_mix(contexts: Contexts) -> None:
    async with pair(contexts) as (server, client), trio.open_nursery() as nursery:
        for letter in (b"a", b"b"):
            nursery.start_soon(server.send_all, letter * len(LARGE))
        data = await exactly(client, 2 * len(LARGE))
    halves = {data[: len(LARGE)], data[len(LARGE) :]}
    assert halves == {b"a" * len(LARGE), b"b" * len(LARGE)}


async def test_read_has_one_record_or_as_much_as_was_asked_for(contexts: Contexts) -> None:
    async with pair(contexts) as (server, client):
        await server.send_all(bytes(2 * RECORD_BYTES))
        assert len(await client.receive_some(5)) == 5
        assert len(await client.receive_some()) == RECORD_BYTES - 5
        assert len(await client.receive_some(10 * RECORD_BYTES)) == RECORD_BYTES


async def test_read_into_a_buffer_takes_all_records_that_have_come(contexts: Contexts) -> None:
    async with pair(contexts) as (server, client):
        await server.send_all(LARGE[: 2 * RECORD_BYTES])
        await server.send_all(b"end")
        buffer, filled = bytearray(10 * RECORD_BYTES), 0
        while filled < 2 * RECORD_BYTES + 3:
            filled += await client.receive_into(memoryview(buffer)[filled:])
        assert buffer[:filled] == LARGE[: 2 * RECORD_BYTES] + b"end"
        server.finish()
        assert await client.receive_into(memoryview(buffer)) == 0


@pytest.mark.parametrize("says_so", [True, False])
async def test_end_of_the_stream_reads_as_one_also_without_a_notice(
    contexts: Contexts, *, says_so: bool
) -> None:
    async with pair(contexts) as (server, client):
        await server.send_all(b"last")
        server._broken = not says_so
        server.finish()
        server.finish()
        assert await exactly(client, 4) == b"last"
        assert await client.receive_some() == b""
        assert await client.receive_some() == b""


async def test_message_that_was_cut_off_breaks_the_stream_for_later_ones(
    contexts: Contexts,
) -> None:
    async with pair(contexts) as (server, _), trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def send() -> None:
            with scope:
                while True:
                    await server.send_all(LARGE)

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError, match="an earlier message was cut off"):
            await server.send_all(b"later")


async def test_cancelled_task_sends_nothing_and_breaks_nothing(contexts: Contexts) -> None:
    async with pair(contexts) as (server, client):
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.send_all(b"never")
        await server.send_all(b"later")
        assert await exactly(client, 5) == b"later"


async def test_peer_that_takes_nothing_is_told_of(
    contexts: Contexts, autojump_clock: trio.testing.MockClock
) -> None:
    async with pair(contexts) as (server, _):
        server.stall_seconds, began = 5, trio.current_time()
        with pytest.raises(trio.TooSlowError):
            await server.send_all(LARGE * 16)  # more than the kernel keeps for a peer
        assert 5 <= trio.current_time() - began <= 10


async def test_closed_stream_ends_those_who_wait_and_refuses_the_rest(
    contexts: Contexts,
) -> None:
    async with pair(contexts) as (server, _):
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await server.receive_some()

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            await server.aclose()
        for call in (
            server.send_all(b"x"),
            server.receive_some(),
            server.receive_into(memoryview(bytearray(1))),
            server.wait_send_all_might_not_block(),
        ):
            with pytest.raises(trio.ClosedResourceError):
                await call
        await server.aclose()


async def test_refused_peer_gets_the_alert(contexts: Contexts) -> None:
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trustme.CA().configure_trust(stranger)
    async with ends((contexts[0], stranger)) as (server, client):
        causes = list[BaseException | None]()

        async def refuse(stream: TLSStream) -> None:
            try:
                await stream.do_handshake()
                await stream.receive_some()
            except trio.BrokenResourceError as broken:
                causes.append(broken.__cause__)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse, client)
            nursery.start_soon(refuse, server)
    assert [isinstance(cause, ssl.SSLError) for cause in causes] == [True, True]
    reasons = {cause.reason for cause in causes if isinstance(cause, ssl.SSLError)}
    assert "CERTIFICATE_VERIFY_FAILED" in reasons
    assert any("ALERT" in reason for reason in reasons)


async def test_peer_that_leaves_in_the_handshake_is_told_of(contexts: Contexts) -> None:
    async with ends(contexts) as (server, client):
        await client.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await server.do_handshake()


async def test_certificates_of_the_peer_are_told(contexts: Contexts) -> None:
    async with pair(contexts) as (server, client):
        assert client.peer_chain[0] == client.tls.getpeercert(binary_form=True)
        assert client.peer_certificate["subjectAltName"] == (("DNS", "localhost"),)
        assert (server.peer_chain, server.peer_certificate) == ((), {})


async def test_each_record_takes_a_turn(contexts: Contexts) -> None:
    turns = list[None]()

    async def take_turn() -> None:
        turns.append(None)

    async with pair(contexts) as (server, client):
        client.take_turn = take_turn
        for count in range(1, 4):
            await server.send_all(b"x")
            assert await client.receive_some() == b"x"
            assert len(turns) == count


async def test_lingering_reads_what_comes_until_the_peer_closes(contexts: Contexts) -> None:
    async with pair(contexts) as (server, client):
        async with trio.open_nursery() as nursery:
            lingered = trio.Event()

            async def linger() -> None:
                await server.linger()
                lingered.set()

            nursery.start_soon(linger)
            await client.send_all(LARGE)
            assert await client.receive_some() == b""
            assert not lingered.is_set()
            await client.aclose()
        assert lingered.is_set()


async def test_acknowledged_bytes_are_counted(contexts: Contexts) -> None:
    async with pair(contexts) as (server, client):
        before = server.taken_bytes
        await server.send_all(bytes(1000))
        await exactly(client, 1000)
        while server.taken_bytes < before + 1000:  # noqa: ASYNC110 - the kernel acknowledges soon
            await trio.sleep(0.001)
