"""TLS streams over real sockets, beside Trio's own: what one sends the other gets, or is told."""

import ctypes
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trustme

from jobworker.tls_stream import RECORD_BYTES, TLSStream

SMALL_BUFFER = 65_536
SO_SNDBUFFORCE = 32
"""Of socket(7)."""
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


async def tcp_pair(client_buffer: int | None = None) -> tuple[trio.SocketStream, ...]:
    """A server's and a client's end; the client's takes little where a buffer is given."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        near = trio.socket.socket()
        if client_buffer is not None:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, client_buffer)
        await near.connect(listener.socket.getsockname())
        return await listener.accept(), trio.SocketStream(near)


Pair = tuple[TLSStream, "trio.SSLStream[trio.SocketStream]"]


@asynccontextmanager
async def pair(contexts: Contexts) -> AsyncIterator[Pair]:
    """Ours as a server, and Trio's as a client that takes little at a time; after the handshake."""
    far, near = await tcp_pair(SMALL_BUFFER)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    ours = TLSStream(far, contexts[0], server_side=True)
    theirs = trio.SSLStream(near, contexts[1], server_hostname="localhost", https_compatible=True)
    async with ours:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.do_handshake)
            nursery.start_soon(theirs.do_handshake)
        yield ours, theirs
    await trio.aclose_forcefully(theirs)


async def exactly(stream: "trio.SSLStream[trio.SocketStream]", size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await stream.receive_some()
        assert piece, f"the end after {len(data)} bytes"
        data += piece
    return bytes(data)


async def wait_until_blocked(stream: TLSStream) -> None:
    """Wait until its peer has taken nothing for a while: it has no more room."""
    taken = -1
    while taken != stream.taken_bytes:
        taken = stream.taken_bytes
        await trio.sleep(0.2)


async def test_bytes_arrive_in_order_both_ways_at_once(
    contexts: Contexts,
) -> None:
    numbers = random.Random(7)
    there, back = numbers.randbytes(3_000_000), numbers.randbytes(2_000_000)
    async with pair(contexts) as (ours, theirs), trio.open_nursery() as nursery:

        async def send_ours() -> None:
            at = 0
            while at < len(there):
                first, second = numbers.randrange(50_000), numbers.randrange(50_000)
                middle = at + first
                await ours.send_all(there[at:middle], memoryview(there)[middle : middle + second])
                at = middle + second

        nursery.start_soon(send_ours)
        nursery.start_soon(theirs.send_all, back)

        async def receive_theirs() -> None:
            assert await exactly(theirs, len(there)) == there

        nursery.start_soon(receive_theirs)
        buffer, filled = bytearray(len(back)), 0
        while filled < len(back):
            filled += await ours.receive_into(memoryview(buffer)[filled : filled + 70_000])
        assert buffer == back


async def test_a_read_takes_all_that_has_come_and_no_more(
    contexts: Contexts,
) -> None:
    async with pair(contexts) as (ours, theirs):
        await theirs.send_all(b"a" * 20_000)  # two records
        await theirs.send_all(b"b" * 100)
        buffer, filled = bytearray(1 << 20), 0
        while filled < 20_100:
            filled += await ours.receive_into(memoryview(buffer)[filled:])
        assert bytes(buffer[:filled]) == b"a" * 20_000 + b"b" * 100
        await ours.send_all(b"c")
        assert await theirs.receive_some() == b"c"  # nothing stands unread when it closes
        await theirs.aclose()
        assert await ours.receive_into(memoryview(buffer)) == 0
        assert await ours.receive_some() == b""


async def test_senders_do_not_mix(contexts: Contexts) -> None:
    async with pair(contexts) as (ours, theirs), trio.open_nursery() as nursery:
        letters = b"abcdefgh"
        for letter in letters:
            nursery.start_soon(ours.send_all, bytes([letter]) * 60_000, bytes([letter]) * 60_000)
        got = await exactly(theirs, 120_000 * len(letters))
        whole = {got[at : at + 120_000] for at in range(0, len(got), 120_000)}
        assert whole == {bytes([letter]) * 120_000 for letter in letters}


async def test_who_takes_nothing_is_told_of_and_who_is_slow_is_not(
    contexts: Contexts,
) -> None:
    size, slowly = 2_500_000, 5
    async with pair(contexts) as (ours, theirs), trio.open_nursery() as nursery:
        # With this buffer there is room again whenever two of these reads were acknowledged.
        ours.socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 19)
        ours.stall_seconds = 1.6
        nursery.start_soon(ours.send_all, bytes(size))
        await wait_until_blocked(ours)
        for _ in range(slowly):
            await exactly(theirs, 65_536)
            await trio.sleep(1)
        await exactly(theirs, size - slowly * 65_536)
    async with pair(contexts) as (ours, theirs):
        ours.stall_seconds = 0.5
        with pytest.raises(trio.TooSlowError):
            await ours.send_all(bytes(size))
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await ours.send_all(b"after it")


async def test_message_that_is_cut_off_breaks_the_stream_for_those_behind_it_alone(
    contexts: Contexts,
) -> None:
    async with pair(contexts) as (ours, theirs), trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(theirs.send_all, b"still heard")

            async def cancel() -> None:
                await wait_until_blocked(ours)
                scope.cancel()

            nursery.start_soon(cancel)
            await ours.send_all(bytes(4_000_000))
        assert scope.cancelled_caught
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await ours.send_all(b"")
        assert await ours.receive_some() == b"still heard"


async def test_who_waits_for_a_turn_may_give_up(
    contexts: Contexts,
) -> None:
    async with pair(contexts) as (ours, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(ours.send_all, b"1" * 2_000_000)
        await wait_until_blocked(ours)
        with trio.move_on_after(0.1) as scope:
            await ours.send_all(b"2")
        assert scope.cancelled_caught
        nursery.start_soon(ours.send_all, b"3")
        assert await exactly(theirs, 2_000_001) == b"1" * 2_000_000 + b"3"


async def test_closing_ends_those_who_wait(
    contexts: Contexts,
) -> None:
    async with pair(contexts) as (ours, _), trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await ours.receive_some()

        async def write() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await ours.send_all(bytes(4_000_000))

        nursery.start_soon(read)
        nursery.start_soon(write)
        await wait_until_blocked(ours)
        await ours.aclose()
        await ours.aclose()
        for act in (ours.receive_some, lambda: ours.send_all(b"")):
            with pytest.raises((trio.ClosedResourceError, trio.BrokenResourceError)):
                await act()
        with pytest.raises(trio.ClosedResourceError):
            _ = ours.taken_bytes


async def test_a_reset_is_told_with_its_cause(contexts: Contexts) -> None:
    async with pair(contexts) as (ours, theirs):
        theirs.transport_stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.transport_stream.socket.close()
        with pytest.raises(trio.BrokenResourceError) as broken:
            await ours.receive_some()
        assert isinstance(broken.value.__cause__, ConnectionResetError)
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"too late")


async def test_peer_that_is_gone_before_the_handshake(
    contexts: Contexts,
) -> None:
    far, near = await tcp_pair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await near.aclose()
    await trio.sleep(0.05)
    with pytest.raises(trio.BrokenResourceError):
        async with TLSStream(far, contexts[0], server_side=True) as stream:
            await stream.do_handshake()


async def test_who_is_refused_is_told_why_whatever_it_sends_meanwhile(
    contexts: Contexts,
) -> None:
    far, near = await tcp_pair()
    strict = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(strict)
    async with TLSStream(far, strict, server_side=True) as ours, trio.open_nursery() as nursery:

        async def refuse() -> None:
            with pytest.raises(trio.BrokenResourceError) as broken:
                await ours.do_handshake()
            assert isinstance(broken.value.__cause__, ssl.SSLError)
            await ours.linger()

        nursery.start_soon(refuse)
        await near.send_all(b"\x16\x03\x01\x00\x05hello" + b"x" * 200_000)
        answer = b""
        while piece := await near.receive_some():
            answer += piece
        assert answer[:1] == b"\x15"  # an alert's record (RFC 8446, section 5.1), and no reset
        await near.aclose()


class Keys:
    """SSL_key_update(3), which Python does not offer."""

    def __init__(self, connection: ssl.SSLObject) -> None:
        mapped = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").split()
        library = next((name for name in mapped if Path(name).name.startswith("libssl.so.3")), None)
        if library is None:
            pytest.skip("Python's OpenSSL is no shared library here")
        self._update = ctypes.CDLL(library).SSL_key_update
        self._update.argtypes = [ctypes.c_void_p, ctypes.c_int]
        at = id(connection._sslobj) + 24  # type: ignore[attr-defined] # behind head and socket
        self._connection = ctypes.cast(at, ctypes.POINTER(ctypes.c_void_p)).contents

    def change(self, *, ask: bool) -> None:
        """Have new keys to send with, and ask the other side to do the same."""
        assert self._update(self._connection, int(ask)) == 1


async def test_peer_may_change_keys(contexts: Contexts) -> None:
    async with pair(contexts) as (ours, theirs):
        keys = Keys(theirs._ssl_object)
        for number in range(6):
            keys.change(ask=number % 2 == 0)
            await theirs.send_all(b"%d" % number)
            assert await ours.receive_some() == b"%d" % number
            await ours.send_all(b"under new keys")
            assert await theirs.receive_some() == b"under new keys"


async def test_peer_may_change_keys_while_nothing_can_be_sent(contexts: Contexts) -> None:
    size = 3_000_000
    async with pair(contexts) as (ours, theirs), trio.open_nursery() as nursery:
        keys = Keys(theirs._ssl_object)
        nursery.start_soon(ours.send_all, bytes(size))
        await wait_until_blocked(ours)
        heard: list[bytes] = []

        async def hear() -> None:
            heard.extend([await ours.receive_some() for _ in range(3)])

        nursery.start_soon(hear)
        for number in range(3):
            keys.change(ask=True)
            await theirs.send_all(b"%d" % number)
        assert await exactly(theirs, size) == bytes(size)
        await ours.send_all(b"under new keys")
        assert await theirs.receive_some() == b"under new keys"
    assert heard == [b"0", b"1", b"2"]


async def test_each_change_of_keys_takes_a_turn(contexts: Contexts) -> None:
    async with pair(contexts) as (ours, theirs):
        keys = Keys(theirs._ssl_object)
        for _ in range(500):
            keys.change(ask=False)
            theirs._ssl_object.do_handshake()
        changes, turns = bytes(theirs._outgoing.read()), 0
        assert len(changes) < RECORD_BYTES, "the control: it comes in one read"

        async def take_turn() -> None:
            nonlocal turns
            await trio.lowlevel.checkpoint()
            turns += 1

        ours.take_turn = take_turn
        await theirs.transport_stream.send_all(changes)
        await theirs.send_all(b"and then")
        assert await ours.receive_some() == b"and then"
        assert turns > 500


async def test_record_that_waits_for_its_turn_is_not_lost(contexts: Contexts) -> None:
    async with pair(contexts) as (ours, theirs):
        ours.take_turn = trio.sleep_forever
        for number in range(3):
            await theirs.send_all(b"%d" % number)
        with trio.move_on_after(0.1) as waiting:
            await ours.receive_some()
        assert waiting.cancelled_caught, "the control: it waited"
        ours.take_turn = trio.lowlevel.checkpoint
        assert [await ours.receive_some() for _ in range(3)] == [b"0", b"1", b"2"]


async def test_endless_changes_of_keys_leave_others_their_turns(contexts: Contexts) -> None:
    async with pair(contexts) as (ours, theirs), trio.open_nursery() as nursery:
        keys = Keys(theirs._ssl_object)
        for _ in range(30_000):
            keys.change(ask=False)
            theirs._ssl_object.do_handshake()
        flood = bytes(theirs._outgoing.read())
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async def send() -> None:
            await theirs.transport_stream.send_all(flood)
            await theirs.send_all(b"and then")

        nursery.start_soon(others)
        nursery.start_soon(send)
        assert await ours.receive_some() == b"and then"
        assert turns >= len(flood) // RECORD_BYTES
        nursery.cancel_scope.cancel()
