"""Frames are handed over in turns of the client's name, on however many connections they come."""

import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing
import trustme

from jobworker.server.connections.frame_scan import SLICE_FRAMES
from jobworker.server.connections.http_head import PrefixStream
from jobworker.server.fairness.fair_scheduling import ActiveClients, FairScheduler
from jobworker.server.requests.operations import INCOMING_A_TURN
from jobworker.tls_stream import RECORD_BYTES, TLSStream

CONNECTIONS = 60
PART = b"\x00\xfe" + (520).to_bytes(2) + bytes(4 + 520)
PARTS = PART * 4 * SLICE_FRAMES
Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    """A server's and a client's."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    return server, client


@asynccontextmanager
async def connected(
    contexts: Contexts, enter: Callable[[str, int], Awaitable[None]]
) -> AsyncIterator[tuple[PrefixStream, TLSStream]]:
    """The service's end of a connection of one name, and the client's."""
    ends = [trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair()]
    ours = TLSStream(ends[0], contexts[0], server_side=True)
    theirs = TLSStream(ends[1], contexts[1], server_name="localhost")
    async with theirs, ours:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.do_handshake)
            nursery.start_soon(theirs.do_handshake)
        yield PrefixStream(ours, b"", partial(enter, "name")), theirs


class Turns(trio.abc.Instrument):
    """Counts the turns of the event loop: it looks for I/O once in each."""

    now = 0

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - as trio calls it
        """See trio.abc.Instrument."""
        self.now += 1


async def test_what_is_handed_over_in_a_turn_is_bounded_however_many_connections(
    contexts: Contexts,
) -> None:
    scheduler, turns, passed = (
        FairScheduler(INCOMING_A_TURN, ActiveClients()),
        Turns(),
        Counter[int](),
    )
    taken = 0

    async def take(stream: PrefixStream) -> None:
        nonlocal taken
        left = len(PARTS)
        while left:
            left -= len(await stream.receive_some(RECORD_BYTES))
            passed[turns.now] += stream.frames.cost
            taken += 1

    async with AsyncExitStack() as stack:
        pairs = [
            await stack.enter_async_context(connected(contexts, scheduler.wait_turn))
            for _ in range(CONNECTIONS)
        ]
        for _, theirs in pairs:
            await theirs.send_all(PARTS)
        trio.lowlevel.add_instrument(turns)
        async with trio.open_nursery() as nursery:
            for stream, _ in pairs:
                nursery.start_soon(take, stream)
        trio.lowlevel.remove_instrument(turns)
    assert taken > 4 * CONNECTIONS, "the control: they had as much to hand over as a few turns have"
    assert max(passed.values()) < 1.5 * INCOMING_A_TURN


async def test_what_is_half_sent_holds_no_turn(contexts: Contexts) -> None:
    scheduler = FairScheduler(1, ActiveClients())
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for _ in range(10):
            stream, theirs = await stack.enter_async_context(
                connected(contexts, scheduler.wait_turn)
            )
            await theirs.send_all(PART[:10])
            assert await stream.receive_some(RECORD_BYTES) == PART[:10]
            nursery.start_soon(stream.receive_some, RECORD_BYTES)
        stream, theirs = await stack.enter_async_context(connected(contexts, scheduler.wait_turn))
        await theirs.send_all(PART)
        with trio.fail_after(20):
            assert await stream.receive_some(RECORD_BYTES) == PART
        nursery.cancel_scope.cancel()


async def test_who_gives_up_waiting_for_a_turn_loses_nothing(contexts: Contexts) -> None:
    scheduler = FairScheduler(1, ActiveClients())
    async with connected(contexts, scheduler.wait_turn) as (stream, theirs):
        await theirs.send_all(PARTS)
        got = b""
        while len(got) < len(PARTS):
            with trio.CancelScope() as scope:
                scope.cancel()
                got += await stream.receive_some(RECORD_BYTES)
            await trio.sleep(0.001)
            with trio.move_on_after(0.001):
                got += await stream.receive_some(RECORD_BYTES)
    assert got == PARTS


@pytest.mark.parametrize("in_line", ["record", "frames"])
async def test_what_stands_in_line_has_come(
    contexts: Contexts, in_line: str, mock_clock: trio.testing.MockClock
) -> None:
    """However long that is: only the wait for what has not come has an end."""
    entered, passes, looks = list[int](), trio.Event(), 0
    waits_at = {"record": 1, "frames": 2}[in_line]

    async def enter(_: str, cost: int) -> None:
        entered.append(cost)
        if len(entered) == waits_at:
            await passes.wait()

    async def look() -> float:
        nonlocal looks
        looks += 1
        return 1

    async with connected(contexts, enter) as (stream, theirs), trio.open_nursery() as nursery:
        stream.check = look
        await theirs.send_all(PART)
        got = list[bytes]()

        async def take() -> None:
            got.append(await stream.receive_some(RECORD_BYTES))

        nursery.start_soon(take)
        while len(entered) < waits_at:
            await trio.lowlevel.checkpoint()
        mock_clock.jump(10)
        await trio.testing.wait_all_tasks_blocked()
        passes.set()
    assert got == [PART]
    assert (len(entered), looks) == (2, 1)


async def test_what_does_not_come_is_looked_for_in_time(
    contexts: Contexts, mock_clock: trio.testing.MockClock
) -> None:
    scheduler, looked = FairScheduler(INCOMING_A_TURN, ActiveClients()), trio.Event()

    async def look() -> float:
        if trio.current_time() >= 1:
            looked.set()
        return 1

    async with (
        connected(contexts, scheduler.wait_turn) as (stream, _),
        trio.open_nursery() as nursery,
    ):
        stream.check = look
        nursery.start_soon(stream.receive_some, RECORD_BYTES)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(1)
        await looked.wait()
        nursery.cancel_scope.cancel()
