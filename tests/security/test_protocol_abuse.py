"""Clients that stall, flood, lie and break the protocol; after each, everyone else is served."""

import json
import socket
import ssl
import statistics
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

import jobworker
from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.errors import TooManyConnections
from jobworker.pki.authority import Authority

from ..integration.conftest import running, until
from ..integration.test_access import certificate_of
from ..integration.wire import Json, Refused, Wire, open_socket, open_wire
from ..services import open_embedded
from .raw_socket import (
    BINARY,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    UPGRADE,
    Frame,
    Raw,
    dial,
    frame,
    open_raw,
    over_tls,
    rest,
    soak,
)

LIMITS: dict[str, object] = {
    "max_connections": 30,
    "max_connections_per_certificate": 12,
    "max_handshakes": 40,
    "handshake_timeout": "3s",
    "max_failed_handshakes": 50,
    "max_message_bytes": 1 << 20,
    "max_requests_in_flight": 8,
    "max_follows": 4,
}
HELLO = b'{"jsonrpc":"2.0","id":1,"method":"service.hello"}'


@pytest.fixture(scope="module")
def guarded(open_directory: Callable[[], Path]) -> Iterator[EmbeddedService]:
    """A service with low limits."""
    with running(open_directory(), {"limits": LIMITS}) as made:
        yield made


@pytest.fixture
async def bystander(guarded: EmbeddedService) -> AsyncIterator[Wire]:
    """Someone who was there before the attack, and must be served after it."""
    async with open_wire(guarded, "viewer") as wire:
        yield wire
        with trio.fail_after(60):
            await wire.call("job.list")
    assert "incident" not in guarded.log_text()


# --- handshakes ------------------------------------------------------------------------------


def client_hello(service: EmbeddedService) -> bytes:
    """The first bytes of a TLS handshake."""
    outgoing = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(
        ssl.MemoryBIO(), outgoing, server_hostname=service.address.rsplit(":", 1)[0]
    )
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


async def drip(stream: trio.abc.SendStream, data: bytes) -> None:
    """Send one byte at a time, as slowly as a client that is alive would not."""
    for number in range(len(data)):
        await stream.send_all(data[number : number + 1])
        await trio.sleep(0.2)


async def say_nothing(_: EmbeddedService, tcp: trio.SocketStream) -> trio.abc.Stream:
    await trio.lowlevel.checkpoint()
    return tcp


async def half_a_hello(service: EmbeddedService, tcp: trio.SocketStream) -> trio.abc.Stream:
    await tcp.send_all(client_hello(service)[:100])
    return tcp


async def drip_a_hello(service: EmbeddedService, tcp: trio.SocketStream) -> trio.abc.Stream:
    with trio.move_on_after(2):
        await drip(tcp, client_hello(service))
    return tcp


async def hello_and_no_more(service: EmbeddedService, tcp: trio.SocketStream) -> trio.abc.Stream:
    await tcp.send_all(client_hello(service))
    return tcp


async def no_request(service: EmbeddedService, tcp: trio.SocketStream) -> trio.abc.Stream:
    stream = over_tls(service, tcp)
    await stream.do_handshake()
    return stream


async def half_a_request(service: EmbeddedService, tcp: trio.SocketStream) -> trio.abc.Stream:
    stream = over_tls(service, tcp)
    await stream.send_all(UPGRADE)
    return stream


async def drip_a_request(service: EmbeddedService, tcp: trio.SocketStream) -> trio.abc.Stream:
    stream = over_tls(service, tcp)
    with trio.move_on_after(2):
        await drip(stream, UPGRADE)
    return stream


Stage = Callable[[EmbeddedService, trio.SocketStream], Awaitable[trio.abc.Stream]]
STAGES: list[Stage] = [
    say_nothing,
    half_a_hello,
    drip_a_hello,
    hello_and_no_more,
    no_request,
    half_a_request,
    drip_a_request,
]


async def test_handshake_that_stalls_at_any_stage_is_ended(
    guarded: EmbeddedService, bystander: Wire
) -> None:
    ended = []

    async def stall(stage: Stage) -> None:
        tcp = await dial(guarded, "127.0.0.2")
        try:
            stream = await stage(guarded, tcp)
            await rest(stream)
            ended.append(stage.__name__)
        finally:
            tcp.socket.close()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for stage in STAGES:
                nursery.start_soon(stall, stage)
    assert sorted(ended) == sorted(stage.__name__ for stage in STAGES)
    await until(
        lambda: (
            "handshake_too_slow: cannot wait for the handshake: 3 s are over" in guarded.log_text()
        )
    )


async def test_those_who_stall_make_room_for_those_who_do_not(
    guarded: EmbeddedService, bystander: Wire
) -> None:
    async with AsyncExitStack() as stack:
        for number in range(45):
            tcp = await dial(guarded, f"127.0.1.{number // 20 + 1}")
            stack.callback(tcp.socket.close)
            if not number:
                oldest = tcp
        with trio.fail_after(60):
            assert await rest(oldest) == b""
        async with open_wire(guarded) as wire:
            await wire.call("service.hello")
    await until(lambda: "too_many_handshakes: cannot wait for the handshake" in guarded.log_text())


async def test_address_that_fails_and_fails_keeps_no_certificate_out(
    guarded: EmbeddedService, bystander: Wire
) -> None:
    async def fail(said: bytes) -> None:
        tcp = await dial(guarded, "127.0.0.1")
        try:
            await tcp.send_all(said)
            if said:
                await rest(tcp)
        except trio.BrokenResourceError:
            pass
        finally:
            tcp.socket.close()

    async def keep_failing() -> None:
        while True:
            await fail(b"\x16\x03\x01\x00\x05aaaaa")

    async def get_in() -> None:
        # On a busy host those whose ends are under way have the address's places as well, and the
        # library waits for ever where a connection is closed before it is upgraded.
        served = False
        for _ in range(5):
            try:
                with trio.move_on_after(5):
                    async with open_wire(guarded) as wire:
                        await wire.call("service.hello")
                        served = True
            except* trio.BrokenResourceError:
                pass
            if served:
                return
        pytest.fail("no attempt of five came in")

    with trio.fail_after(60):
        for number in range(120):  # of 50 that are no reason to slow anybody down
            await fail(b"GET / HTTP/1.0\r\n\r\n" if number % 2 else b"")
            await fail(b"\x16\x03\x01\x00\x05aaaaa")
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(keep_failing)
            for _ in range(3):
                await get_in()
            nursery.cancel_scope.cancel()


FLOOD_OF_HELLOS = """
import socket, sys
hello, standing = bytes.fromhex(sys.argv[2]), []
while True:
    try:
        standing.append(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
        standing[-1].send(hello)
    except OSError:
        pass
    del standing[:-50]
"""


async def test_job_that_floods_the_port_slows_down_jobs_alone(
    open_directory: Callable[[], Path],
) -> None:
    limits = {"max_failed_handshakes": 5, "max_handshakes": 20}
    async with open_embedded(open_directory(), {"limits": limits}) as service:
        port, hello = service.address.rpartition(":")[2], client_hello(service).hex()
        async with open_wire(service) as wire:
            command = ["python3", "-c", FLOOD_OF_HELLOS, port, hello]
            flood = await wire.start(*command, network="host")
            await until(lambda: "cannot serve this host (jobs)" in service.log_text())
            for _ in range(10):
                async with open_wire(service) as other:
                    await other.call("service.hello")
            await wire.call("job.stop", id=flood, signal="KILL")
        assert "cannot serve this host (uid" not in service.log_text()


async def test_connects_without_a_whole_hello_are_no_failures(
    open_directory: Callable[[], Path],
) -> None:
    limits = {"max_failed_handshakes": 5}
    async with open_embedded(open_directory(), {"limits": limits}) as service:
        with trio.fail_after(30):
            hello = client_hello(service)
            for number in range(120):
                tcp = await dial(service)
                if said := (b"", hello[:1], hello[:100], b"GET")[number % 4]:
                    await tcp.send_all(said)
                tcp.socket.close()
            async with open_wire(service) as wire:
                await wire.call("service.hello")
        assert "TLS refused" not in service.log_text()


async def timed(wire: Wire, times: int) -> float:
    """The median time of a list."""
    took = []
    for _ in range(times):
        began = trio.current_time()
        await wire.call("job.list", limit=10)
        took.append(trio.current_time() - began)
    return statistics.median(took)


async def test_thousands_of_half_open_connections_leave_clients_alone(
    open_directory: Callable[[], Path],
) -> None:
    count = soak(400, 5000)
    sockets: list[socket.socket] = []
    async with open_embedded(open_directory()) as service, open_wire(service) as wire:
        usual = await timed(wire, 50)
        host, port = service.address.rsplit(":", 1)
        try:
            hello = client_hello(service)
            for number in range(count):
                made = socket.socket()
                sockets.append(made)
                made.bind((f"127.0.{2 + number // 250}.{1 + number % 250}", 0))
                made.connect((host, int(port)))
                if number % 2:
                    made.send(hello[:100])
                if number % 50 == 0:
                    await wire.call("service.hello")
            # The first fifth of a second goes to those that have just come, many a millisecond.
            meanwhile = await timed(wire, soak(50, 300))
            async with open_wire(service) as another:  # and who comes now gets in
                await another.call("service.hello")
        finally:
            for each in sockets:
                each.close()
    # Three times where nothing else disturbs the measurement; shared machines do.
    assert meanwhile < usual * 3 + soak(1, 0)


# --- frames ----------------------------------------------------------------------------------


@asynccontextmanager
async def closed_with(service: EmbeddedService, code: int | None) -> AsyncIterator[Raw]:
    """A connection that the server closes after the block, with `code`, or cuts."""
    with trio.fail_after(30):
        async with open_raw(service) as raw:
            yield raw
            found = await raw.closing()
            assert code is None or (found is not None and found.code == code), found


BROKEN = {
    "unmasked": frame(TEXT, HELLO, masked=False),
    "reserved opcode": frame(3, b"x"),
    "compressed, though that was not agreed": frame(TEXT, HELLO, first=0xC0),
    "reserved bits": frame(TEXT, HELLO, first=0xB0),
    "ping of 126 bytes": frame(PING, b"x" * 126),
    "ping in fragments": frame(PING, b"x", first=0),
    "continuation of nothing": frame(CONTINUATION, b"x"),
    "new message in the middle of one": frame(TEXT, b"{", first=0) + frame(TEXT, b"}"),
    "overlong length": b"\x81\xff" + struct.pack("!Q", 1 << 63) + b"\0\0\0\0",
    "close of one byte": frame(8, b"x"),
    "close of a code that is never sent": frame(8, struct.pack("!H", 1005)),
    "length longer than need be": b"\x81\xfe" + struct.pack("!H", 1) + b"\0\0\0\0x",
}
BROKEN_TEXT = {
    "text that is no UTF-8": frame(TEXT, b'"\xff"'),
    "text of a surrogate": frame(TEXT, b'"\xed\xa0\x80"'),
    "close whose reason is no UTF-8": frame(8, struct.pack("!H", 1000) + b"\xff"),
}


@pytest.mark.parametrize(
    ("bytes_", "code"),
    [*((each, 1002) for each in BROKEN.values()), *((each, 1007) for each in BROKEN_TEXT.values())],
    ids=[*BROKEN, *BROKEN_TEXT],
)
async def test_frame_that_breaks_the_protocol_ends_its_connection_with_a_reason(
    guarded: EmbeddedService, bystander: Wire, bytes_: bytes, code: int
) -> None:
    with trio.fail_after(30):
        async with open_raw(guarded) as raw:
            await raw.send(bytes_)
            found = await raw.closing()
            assert found is not None
            assert found.code == code
            assert found.payload[2:].startswith(b"invalid_request: ")
            assert len(found.payload) > 20
            await raw.send(frame(8, found.payload[:2]))
            with pytest.raises(EOFError):
                await raw.receive()


async def test_client_that_closes_for_a_fault_of_the_server_gets_one_closing_frame(
    guarded: EmbeddedService, bystander: Wire
) -> None:
    with trio.fail_after(30):
        async with open_raw(guarded) as raw:
            await raw.send(frame(8, struct.pack("!H", 1002)))
            assert await raw.closing() == Frame(8, struct.pack("!H", 1002))
            with pytest.raises(EOFError):
                await raw.receive()


async def test_message_in_fragments_is_one_message(guarded: EmbeddedService) -> None:
    async with open_raw(guarded) as raw:
        with trio.fail_after(60):
            await raw.send(frame(TEXT, HELLO[:10], first=0))
            await raw.send(frame(PING, b"between"))
            for byte in HELLO[10:-1]:
                await raw.send(frame(CONTINUATION, bytes([byte]), first=0))
            await raw.send(frame(CONTINUATION, HELLO[-1:]))
            assert (await raw.receive()).payload == b"between"
            assert json.loads((await raw.receive()).payload)["result"]["role"] == "admin"


async def test_message_beyond_the_limit_is_refused_by_name(
    guarded: EmbeddedService, bystander: Wire
) -> None:
    async with closed_with(guarded, 1009) as raw:
        await raw.send(frame(TEXT, b"x" * ((1 << 20) + 1)))
    async with closed_with(guarded, 1009) as raw:  # in fragments as well
        await raw.send(frame(TEXT, b"x" * 600_000, first=0))
        await raw.send(frame(CONTINUATION, b"x" * 600_000, first=0))
    words = "message_too_large: cannot take a message of more than 1048576 bytes"
    await until(lambda: words in guarded.log_text())


SMALL = {
    "pongs": frame(PONG, b""),
    "pings": frame(PING, b""),
    "empty parts": frame(CONTINUATION, b"", first=0),
    "parts of a byte": frame(CONTINUATION, b"x", first=0),
}


async def test_message_of_endless_empty_frames_is_ended(
    guarded: EmbeddedService, bystander: Wire
) -> None:
    with trio.fail_after(60):
        async with open_raw(guarded) as raw:
            await raw.stream.send_all(frame(TEXT, b"", first=0))
            with suppress(trio.BrokenResourceError):
                while True:
                    await raw.stream.send_all(frame(CONTINUATION, b"", first=0) * 1000)


@pytest.mark.parametrize("small", SMALL.values(), ids=SMALL)
async def test_flood_of_small_frames_is_ended_by_name(
    guarded: EmbeddedService, bystander: Wire, small: bytes
) -> None:
    async with closed_with(guarded, 1013) as raw:
        await raw.send(frame(TEXT, b"{", first=0) + small * 1100)
    await until(
        lambda: "too_many_frames: cannot take more than 20 control frames" in guarded.log_text()
    )


async def test_compression_is_not_agreed_upon(guarded: EmbeddedService) -> None:
    async with open_raw(guarded, b"Sec-WebSocket-Extensions: permessage-deflate\r\n") as raw:
        assert raw.head.startswith(b"HTTP/1.1 101")
        assert b"deflate" not in raw.head.lower()


async def test_requests_are_text(guarded: EmbeddedService) -> None:
    async with open_raw(guarded) as raw:
        with trio.fail_after(60):
            await raw.send(frame(BINARY, HELLO))
            assert json.loads((await raw.receive()).payload)["error"]["code"] == -32600
            await raw.send(frame(TEXT, HELLO))
            assert "result" in json.loads((await raw.receive()).payload)


HOSTILE_JSON = {
    "deep": "[" * 500_000,
    "deep in a parameter": '{"jsonrpc":"2.0","id":1,"method":"job.list","params":{"states":'
    + "[" * 1000
    + "]" * 1000
    + "}}",
    "millions of values": "[" + "[]," * 300_000 + "[]]",
    "duplicate key in a parameter": '{"jsonrpc":"2.0","id":1,"method":"job.list",'
    '"params":{"limit":1,"limit":2}}',
    "duplicate key by another spelling": '{"jsonrpc":"2.0","id":1,"method":"job.list",'
    '"params":{"limit":1,"l\\u0069mit":2}}',
    "huge integer": '{"jsonrpc":"2.0","id":' + "9" * 500_000 + "}",
    "infinity by size": '{"jsonrpc":"2.0","id":1,"method":"job.list","params":{"limit":1e999}}',
    "lone surrogate as an id": '{"jsonrpc":"2.0","id":"\\ud800","method":"service.hello"}',
    "lone surrogate as a key": '{"jsonrpc":"2.0","id":1,"method":"job.list",'
    '"params":{"\\udfff":1}}',
    "lone surrogate as a member": '{"jsonrpc":"2.0","id":1,"method":"job.list","\\udfff":1}',
    "lone surrogate in a variable": '{"jsonrpc":"2.0","id":1,"method":"job.run",'
    '"params":{"job":{"command":["true"],"environment":{"\\udfff":"x"}}}}',
    "byte order mark": "\ufeff" + HELLO.decode(),
    "object of many unknown keys": json.dumps(dict.fromkeys(map(str, range(50_000)))),
    "parameters of many unknown keys": '{"jsonrpc":"2.0","id":1,"method":"job.list","params":'
    + json.dumps(dict.fromkeys(map(str, range(50_000))))
    + "}",
    "key of half a megabyte": '{"jsonrpc":"2.0","id":1,"method":"job.run","params":{"job":'
    '{"command":["true"],"environment":{"' + "a=" * 250_000 + '":"x"}}}}',
    "object of many faults": '{"jsonrpc":"2.0","id":1,"method":"job.run",'
    '"params":{"job":{"command":' + json.dumps(list(range(16_000))) + "}}}",
}


@pytest.mark.parametrize("text", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
async def test_hostile_json_gets_an_error_and_the_connection_lives(
    guarded: EmbeddedService, bystander: Wire, text: str
) -> None:
    with trio.fail_after(20):
        async with open_raw(guarded) as raw:
            await raw.send(frame(TEXT, text.encode()))
            answer = (await raw.receive()).payload
            assert json.loads(answer)["error"]["code"] in (-32700, -32600, -32602)
            assert len(answer) < 20_000
            await raw.send(frame(TEXT, HELLO))
            while (found := await raw.receive()).opcode == PING:
                pass
            assert "result" in json.loads(found.payload)


# --- what clients may take up ----------------------------------------------------------------


async def test_connections_of_one_name_are_bounded(
    guarded: EmbeddedService, bystander: Wire, open_directory: Callable[[], Path]
) -> None:
    authority = Authority.load(guarded.directory / "certs")
    issued = authority.issue_client("admin-client", "admin", now=datetime.now(UTC))
    second = certificate_of(guarded, open_directory(), issued)
    files = guarded.environment("admin")
    async with AsyncExitStack() as stack:
        for number in range(12):
            context = second if number % 2 else None
            await stack.enter_async_context(open_socket(guarded, context=context))
        with pytest.raises(TooManyConnections, match="12 are open with certificates of this name"):
            async with jobworker.open_client(
                guarded.address,
                ca=files["WORKER_CA_PATH"],
                certificate=files["WORKER_CERT_PATH"],
                key=files["WORKER_KEY_PATH"],
            ):
                raise AssertionError("it was let in")
        async with open_wire(guarded, "viewer") as other:  # another certificate
            await other.call("service.hello")
    async with open_wire(guarded) as wire:  # and places are given back
        await wire.call("service.hello")


async def test_requests_in_flight_are_bounded_and_credits_pass_them(
    guarded: EmbeddedService,
) -> None:
    async with open_wire(guarded) as wire, trio.open_nursery() as nursery:
        job = {"command": ["sh", "-c", "yes | head -c 100000; exec sleep 600"]}
        follow = {"credit_bytes": 1}
        started = await wire.call("job.run", job=job, follow=follow)
        record, subscription = started["job"], started["subscription"]
        assert isinstance(record, dict)

        async def wait() -> None:
            await wire.call("job.wait", id=record["id"])

        for _ in range(8):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(Refused) as refused, trio.fail_after(60):
            await wire.call("service.hello")
        assert refused.value.code == 1007
        for _ in range(40):  # notifications are no requests
            await wire.notify("job.credit", subscription=subscription, bytes=100)
        got = 0
        notes = wire.notes(subscription)
        with trio.fail_after(60):
            while got < 4001:
                params = (await notes.receive())["params"]
                assert isinstance(params, dict)
                got += len(params["data"]) // 4 * 3
        async with open_wire(guarded) as another:
            await another.call("job.stop", id=record["id"], grace_seconds=0)
    await until(lambda: "too_many_requests" in guarded.log_text())


async def test_follows_of_one_connection_are_bounded(guarded: EmbeddedService) -> None:
    async with open_wire(guarded) as wire:
        job = await wire.start("sleep", "600")
        opened = [(await wire.call("job.log", id=job))["subscription"] for _ in range(4)]
        with pytest.raises(Refused) as refused:
            await wire.call("job.log", id=job)
        assert refused.value.code == 1008
        await wire.notify("job.unfollow", subscription=opened[0])
        await wire.call("job.log", id=job)
        await wire.call("job.stop", id=job, grace_seconds=0)


async def test_client_that_answers_no_pings_is_let_go(open_directory: Callable[[], Path]) -> None:
    limits = {"ping_interval": "100ms", "ping_timeout": "1s"}
    async with open_embedded(open_directory(), {"limits": limits}) as service:
        with trio.fail_after(40):
            async with open_raw(service) as raw:
                await raw.send(frame(TEXT, HELLO))
                seen = set[int]()
                while not {TEXT, PING} <= seen:  # in any order on a busy host
                    seen.add((await raw.receive()).opcode)
                found: Frame | None = await raw.closing()
        assert found is not None
        assert found.code == 1013
        assert found.payload[2:].startswith(b"ping_unanswered: ")
        await until(lambda: "ping_unanswered" in service.log_text())


BEHIND_THE_END = {
    "nothing": b"",
    "ping": frame(PING, b"x"),
    "request": frame(TEXT, HELLO),
    "part of a message beyond the limit": frame(TEXT, b"x" * 2_000_000, first=0),
    **BROKEN,
}


async def test_what_comes_behind_the_servers_closing_frame_is_no_fault(
    open_directory: Callable[[], Path],
) -> None:
    limits = {"ping_interval": "50ms", "ping_timeout": "100ms", "max_message_bytes": 1 << 20}
    async with open_embedded(open_directory(), {"limits": limits}) as service:
        for name, late in BEHIND_THE_END.items():
            with trio.fail_after(30):
                async with open_raw(service) as raw:
                    found = await raw.closing()
                    assert found is not None, name
                    assert found.code == 1013, name
                    await raw.send(late)
                    assert await rest(raw.stream) == b"", name
    assert "incident" not in service.log_text()  # it has ended: what would come has come


async def test_client_that_takes_nothing_is_let_go_and_a_slow_one_is_not(
    open_directory: Callable[[], Path],
) -> None:
    size = 4 << 20
    impatient = {"server": {"stall_timeout": "1s"}}
    async with open_embedded(open_directory(), impatient) as service, open_wire(service) as wire:
        _, _, job = await wire.run("head", "-c", str(size), "/dev/zero")
        params = {"id": job["id"], "delivery": {"encoding": "binary"}}
        ask = {"jsonrpc": "2.0", "id": 1, "method": "job.log", "params": params}
        with trio.fail_after(60):
            async with open_raw(service, buffer=1 << 16) as slow:
                await slow.send(frame(TEXT, json.dumps(ask).encode()))
                got, began = 0, trio.current_time()
                while got < size:
                    found = await slow.receive()
                    if found.opcode == BINARY:
                        got += len(found.payload.partition(b"\n")[2])
                        await trio.sleep(0.4)
                assert trio.current_time() - began > 2
            async with open_raw(service, buffer=1 << 16) as stuck:
                await stuck.send(frame(TEXT, json.dumps(ask).encode()))
                await until(lambda: "send_stalled" in service.log_text())
                assert await stuck.closing() is None  # it is in the midst of a message
        assert service.log_text().count("send_stalled") == 1
        assert "incident" not in service.log_text()


async def test_subscription_that_ends_in_the_middle_of_a_message_ends_nothing_else(
    guarded: EmbeddedService, bystander: Wire
) -> None:
    flood = {"command": ["sh", "-c", "exec yes"]}
    async with open_raw(guarded) as raw:

        async def ask(number: int, method: str, **params: object) -> Json:
            request = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
            await raw.stream.send_all(frame(TEXT, json.dumps(request).encode()))
            while True:
                found = await raw.receive()
                if found.opcode == TEXT:
                    body: Json = json.loads(found.payload)
                    if body.get("id") == number:
                        return body

        with trio.fail_after(60):
            started = await ask(1, "job.run", job=flood, follow={"encoding": "binary"})
            result = started["result"]
            assert isinstance(result, dict)
            job = result["job"]["id"]
            try:
                # Nothing is read for a while: the server stands in the middle of a message.
                await trio.sleep(0.5)
                unfollow = {"subscription": result["subscription"]}
                for number in range(2, 6):
                    await ask(number, "job.unfollow", **unfollow)
                    await trio.sleep(0.1)
                    again = await ask(
                        number * 10, "job.log", id=job, delivery={"encoding": "binary"}
                    )
                    assert isinstance(again["result"], dict)
                    unfollow = {"subscription": again["result"]["subscription"]}
                    await trio.sleep(0.2)
            finally:
                async with open_wire(guarded) as another:
                    await another.call("job.stop", id=job, grace_seconds=0)


async def test_client_that_asks_and_never_reads_holds_nobody_up(
    guarded: EmbeddedService, bystander: Wire
) -> None:
    async with open_raw(guarded) as silent:
        with trio.move_on_after(3):
            for number in range(20_000):
                request = {"jsonrpc": "2.0", "id": number, "method": "rpc.discover"}
                await silent.send(frame(TEXT, json.dumps(request).encode()))
        with trio.fail_after(60):
            await bystander.call("job.list")
            async with open_wire(guarded, "viewer") as another:
                await another.call("service.hello")


# --- what commands may hold ------------------------------------------------------------------


async def test_odd_commands_run_as_they_are_or_are_refused(guarded: EmbeddedService) -> None:
    async with open_wire(guarded) as wire:
        out, _, job = await wire.run("printf", "%s|", "--", "-rf", "--help", "")
        assert (out, job["state"]) == ("--|-rf|--help||", "COMPLETED")
        out, err, job = await wire.run("echo", "alive", environment={"LD_PRELOAD": "/no/such.so"})
        assert (out, job["state"]) == ("alive\n", "COMPLETED")
        assert "LD_PRELOAD" in err  # the job's own loader, nobody else's
        for command, code in (
            (["./nosuch"], 1011),
            (["/no/such/program"], 1011),
            (["nosuch"], 1011),
            (["/etc"], 1012),
            (["-rf"], 1011),
            (["../../../../bin/nosuch"], 1011),
        ):
            with pytest.raises(Refused) as refused:
                await wire.start(*command)
            assert refused.value.code == code, command
        _, _, job = await wire.run("./true", workdir="/usr/bin")
        assert job["state"] == "COMPLETED"


FORGED = "x\n2026-01-01T00:00:00Z INFO forged: everything is well\r\x1b[2K\u2028forged"


async def test_nothing_that_a_client_says_makes_a_line_of_the_log(
    guarded: EmbeddedService, bystander: Wire
) -> None:
    async with open_wire(guarded) as wire:
        await wire.run("true", FORGED, environment={"A": FORGED})
        for method, params in (
            ("job.run", {"job": {"command": ["true"], "name": FORGED}}),
            ("job.run", {"job": {"command": [FORGED]}}),
            ("job.run", {"job": {"command": ["true"], "workdir": "/" + FORGED}}),
            ("job.run", {"job": {"command": ["true"], "environment": {FORGED: "x"}}}),
            ("job.stop", {"id": 1, "signal": FORGED}),
            (FORGED, {}),
        ):
            with pytest.raises(Refused):
                await wire.call(method, **params)
    for line in guarded.log_text().splitlines():
        assert not line.startswith(("2026-01-01", "forged"))
        assert "\x1b" not in line


@pytest.mark.parametrize("request_line", [b"GET / HTTP/1.1", b"POST /x HTTP/1.0"])
async def test_plain_http_is_told_that_the_port_speaks_tls(
    guarded: EmbeddedService, request_line: bytes
) -> None:
    said = b""
    async with await dial(guarded) as tcp:
        with trio.fail_after(60):
            await tcp.send_all(request_line + b"\r\nHost: x\r\n\r\n")
            while more := await tcp.receive_some():
                said += more
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head.lower()
    assert "speaks TLS" in json.loads(body)["error"]["message"]


# --- browsers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        (b"{address}", b"https://{address}", b"101"),
        (b"localhost:{port}", b"https://localhost:{port}", b"101"),
        (b"{address}", b"https://evil.example", b"403"),
        (b"{address}", b"http://{address}", b"403"),
        (b"{address}", b"null", b"403"),
        (b"evil.example", b"https://evil.example", b"421"),
        (b"evil.example:{port}", b"https://evil.example:{port}", b"421"),
    ],
)
async def test_page_of_another_origin_or_of_a_rebound_name_is_refused(
    guarded: EmbeddedService, host: bytes, origin: bytes, status: bytes
) -> None:
    port = guarded.address.rsplit(":", 1)[1].encode()

    def filled(text: bytes) -> bytes:
        return text.replace(b"{address}", guarded.address.encode()).replace(b"{port}", port)

    request = UPGRADE.replace(b"Host: x", b"Host: " + filled(host))
    stream = over_tls(guarded, await dial(guarded))
    try:
        with trio.fail_after(60):
            await stream.send_all(request + b"Origin: " + filled(origin) + b"\r\n\r\n")
            said = bytes(await stream.receive_some(65_536))
    finally:
        await trio.aclose_forcefully(stream)
    assert said.startswith(b"HTTP/1.1 " + status)
    if status != b"101":
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["remedy"]
