"""Clients that ask for much and take nothing, or send much and finish nothing: nobody else pays.

Counted are bytes of memory and the event loop's own processor time, never seconds.
"""

import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import trio
from bench.floods import Target, request
from bench.turns import Turns, watched_turns
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from trio_websocket import ConnectionClosed, WebSocketConnection

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.client.client import Client
from jobworker.client.opening import open_client
from jobworker.errors import CertificateRefused

from ..integration.conftest import running, until
from ..integration.wire import Json, Refused, Wire, open_socket, open_wire
from ..services import open_embedded
from .client_hello import HANDSHAKE, RECORD_OVERFLOW, client_hello, records
from .raw_socket import TEXT, frame, open_raw

MEBIBYTE = 1 << 20
SHORT_TURN_MS = 6
TURN_MS = 60
"""Such a turn was 100 to 1,800 ms; the bound has room for a machine that is much slower."""


@pytest.fixture(scope="module")
def turns() -> Iterator[Turns]:
    """The longest turns of the service."""
    with watched_turns() as made:
        yield made


@pytest.fixture(scope="module")
def flooded(turns: Turns, open_directory: Callable[[], Path]) -> Iterator[EmbeddedService]:
    """A service with the limits that it has by default."""
    with running(open_directory(), {}) as made:
        yield made


@pytest.fixture
async def bystander(flooded: EmbeddedService) -> AsyncIterator[Wire]:
    """Who was there before, and must be served during and after it."""
    async with open_wire(flooded, "viewer") as wire:
        yield wire
        with trio.fail_after(20):
            await wire.call("service.hello")
    assert "incident" not in flooded.log_text()


@pytest.fixture
async def worker(flooded: EmbeddedService) -> AsyncIterator[Wire]:
    """Who may run jobs."""
    async with open_wire(flooded) as wire:
        yield wire


def memory_bytes(service: EmbeddedService) -> int:
    """What the service's process has now."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def peak_bytes(service: EmbeddedService) -> int:
    """What it had at the most since `forget_peak`."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def forget_peak(service: EmbeddedService) -> None:
    """Count the peak from now on: proc(5), clear_refs."""
    Path(f"/proc/{service.process.pid}/clear_refs").write_text("5")


def large_job(count: int = 45_000) -> Json:
    """A request of nearly a megabyte."""
    return {"command": ["true"], "environment": {f"V{n}": "x" * 10 for n in range(count)}}


async def answer_to(service: EmbeddedService, *flights: bytes) -> bytes:
    """Send each flight without TLS, once the one before it was answered: the last answer."""
    host, port = service.address.rsplit(":", 1)
    answer = b""
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        for flight in flights:
            await stream.send_all(flight)
            answer = await stream.receive_some()
    return answer


async def test_long_hello_of_a_stranger_is_refused_unread(
    turns: Turns, flooded: EmbeddedService, bystander: Wire
) -> None:
    """OpenSSL searched the groups for each share: 60 to 90 ms for the first one of these."""
    await bystander.call("service.hello")
    first = records(client_hello())
    assert (await answer_to(flooded, first))[:1] == HANDSHAKE
    asks_again = records(client_hello(shares=0))
    assert (await answer_to(flooded, asks_again))[:1] == HANDSHAKE
    turns.reset()
    long, small_records = client_hello(16_000, 6_400), records(client_hello(3_000, 600), 100)
    for flights in ((records(long),), (small_records,), (asks_again, small_records)):
        before = flooded.log_text().count("hello is too long")
        assert await answer_to(flooded, *flights) == RECORD_OVERFLOW
        await until(lambda n=before: flooded.log_text().count("hello is too long") > n)  # type: ignore[misc]
    assert turns.longest_ms() < SHORT_TURN_MS, turns.task()


def extra_certificate(padding: int) -> bytes:
    """A certificate that no chain needs, in PEM."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    padded = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), bytes(padding))
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), 1, now, now + timedelta(days=1)
    ).add_extension(padded, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(("padding", "count"), [(0, 70), (17_000, 1)])
async def test_long_chain_of_certificates_is_refused_unread(
    turns: Turns, flooded: EmbeddedService, bystander: Wire, padding: int, count: int
) -> None:
    """281 small ones took 37 ms, of a stranger too; and each connection kept all of its own."""
    await bystander.call("service.hello")
    one = flooded.environment("viewer")
    path = flooded.directory / "chain.pem"

    def connecting(extra: bytes) -> AbstractAsyncContextManager[Client]:
        path.write_bytes(Path(one["WORKER_CERT_PATH"]).read_bytes() + extra)
        return open_client(
            flooded.address,
            ca=Path(one["WORKER_CA_PATH"]),
            certificate=path,
            key=Path(one["WORKER_KEY_PATH"]),
            patience_seconds=0,
        )

    async with connecting(extra_certificate(1700) * 4) as client:  # RSA of 4,096 bits
        await client.hello()
    turns.reset()
    with pytest.raises(CertificateRefused, match="certificates are too long"):
        async with connecting(extra_certificate(padding) * count):
            pass
    await until(lambda: "the client's certificates are too long" in flooded.log_text())
    assert turns.longest_ms() < SHORT_TURN_MS, turns.task()


async def test_replies_that_nobody_takes_cost_a_bounded_amount_of_memory(
    flooded: EmbeddedService, worker: Wire, bystander: Wire
) -> None:
    made = await worker.call("job.run", job=large_job())
    job = made["job"]
    assert isinstance(job, dict)
    await worker.call("job.wait", id=job["id"])
    forget_peak(flooded)
    before = memory_bytes(flooded)
    ask = {"jsonrpc": "2.0", "method": "job.status", "params": {"id": job["id"]}}
    async with AsyncExitStack() as stack:
        for _ in range(6):
            raw = await stack.enter_async_context(open_raw(flooded, buffer=4096))
            with trio.move_on_after(5):
                for number in range(128):
                    request = json.dumps({**ask, "id": number}).encode()
                    await raw.send(frame(TEXT, request))
        for _ in range(50):
            with trio.fail_after(20):
                await bystander.call("service.hello")
    # 768 replies of 0.9 MB were asked for.
    assert peak_bytes(flooded) - before < 64 * MEBIBYTE


def work_ticks(service: EmbeddedService) -> int:
    """The processor time that the service has used so far: utime and stime of proc(5), stat."""
    fields = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def idle(service: EmbeddedService) -> None:
    """Wait until the service has nothing to do any more."""
    before = None
    while (now := work_ticks(service)) != before:
        before = now
        await trio.sleep(1)


@pytest.mark.parametrize("method", ["job.status", "job.wait", "job.stop"])
async def test_calls_whose_replies_nobody_takes_cost_a_bounded_amount_of_memory(
    open_directory: Callable[[], Path], method: str
) -> None:
    """A call costs memory before its reply is there too, on however many connections it waits."""
    async with open_embedded(open_directory(), {}) as service, open_wire(service) as worker:
        job = (await worker.call("job.run", job=large_job()))["job"]
        assert isinstance(job, dict)
        await worker.call("job.wait", id=job["id"])
        requests = b"".join(request(number, method, {"id": job["id"]}) for number in range(128))
        target = Target(service.address, service.directory / "certs")
        await idle(service)
        before = memory_bytes(service)
        forget_peak(service)
        async with AsyncExitStack() as stack:
            for _ in range(60):
                peer = await stack.enter_async_context(target.peer(buffer=4096))
                await peer.send(requests)
            await idle(service)
            async with open_wire(service, "viewer") as bystander:
                await bystander.call("service.hello")
            # Of these 20 MB are for four records of a megabyte.
            assert peak_bytes(service) - before < 40 * MEBIBYTE
        await until(lambda: memory_bytes(service) < 1.2 * before)


async def test_requests_that_nobody_finishes_cost_a_bounded_amount_of_memory(
    flooded: EmbeddedService, bystander: Wire
) -> None:
    forget_peak(flooded)
    before = memory_bytes(flooded)
    whole = frame(TEXT, b"x" * (4 * MEBIBYTE))
    async with AsyncExitStack() as stack:
        for _ in range(40):
            raw = await stack.enter_async_context(open_raw(flooded))
            with trio.move_on_after(0.2):  # what is not read is not taken
                await raw.send(whole[:-1])
        with trio.fail_after(20):
            await bystander.call("service.hello")
    assert peak_bytes(flooded) - before < 64 * MEBIBYTE


LARGE: dict[str, Json] = {
    "variables": {"job": large_job()},
    "too many variables": {"job": {**large_job(49_000), "secret_environment": {"A" * 70_000: ""}}},
    "wrong variables": {"job": {"command": ["true"], "environment": dict.fromkeys("ab", 1)}},
    "arguments": {"job": {"command": ["true", *["a"] * 16_000]}},
    "labels": {"job": {"command": ["true"], "labels": {f"V{n}": "x" for n in range(49_000)}}},
    "cores": {"job": {"command": ["true"], "cpu_cores": ",".join(["0-8191"] * 146)}},
    "numbers": {"x": [0.5] * 99_000},
    "objects": {"x": [{}] * 99_000},
    "commas in a string": {"x": "," * 700_000},
    "escapes": {"x": "\n" * 380_000},
}


@pytest.mark.parametrize("method", ["job.run", "job.plan", "job.list", "no.such"])
@pytest.mark.parametrize("parameters", LARGE.values(), ids=LARGE)
async def test_no_request_holds_the_loop(
    turns: Turns, worker: Wire, method: str, parameters: Json
) -> None:
    turns.reset()
    refused: Refused | None = None
    try:
        result = await worker.call(method, **parameters)
    except Refused as error:
        refused = error
    else:
        if method == "job.run":
            job = result["job"]
            assert isinstance(job, dict)
            await worker.call("job.wait", id=job["id"])
    assert refused is None or (refused.code != -32603 and len(refused.message) < 8000)
    assert turns.longest_ms() < TURN_MS, turns.task()


async def test_many_values_in_a_short_request_do_not_hold_the_loop(
    turns: Turns, bystander: Wire
) -> None:
    """As many as sixteen thousand characters hold: they took 8 ms, four in a turn."""
    turns.reset()
    for _ in range(3):
        with pytest.raises(Refused):
            await bystander.call("job.log", id=1, starts=[{}] * 4000)
    assert turns.longest_ms() < SHORT_TURN_MS, turns.task()


async def test_large_request_of_a_role_that_runs_nothing_is_refused_unread(
    turns: Turns, flooded: EmbeddedService, bystander: Wire
) -> None:
    request = {"jsonrpc": "2.0", "id": 7, "method": "job.run", "params": {"job": large_job(90_000)}}
    turns.reset()
    async with open_socket(flooded, "viewer") as socket:
        await socket.send_message(json.dumps(request))
        reply = json.loads(await socket.get_message())
        assert reply["id"] is None
        assert reply["error"]["data"]["name"] == "permission_denied"
        assert (
            "of more than 32768 characters: only clients that may run jobs"
            in reply["error"]["message"]
        )
        await socket.send_message('{"jsonrpc":"2.0","id":8,"method":"service.hello"}')
        assert json.loads(await socket.get_message())["id"] == 8
    assert turns.longest_ms() < TURN_MS, turns.task()


async def test_permission_comes_before_faults_of_the_parameters(bystander: Wire) -> None:
    jobs: list[Json] = [{}, {"command": []}, {"command": ["true"], "labels": {"-": ""}}]
    for job in jobs:
        with pytest.raises(Refused, match="'viewer' may not") as refused:
            await bystander.call("job.run", job=job)
        assert refused.value.code == 1002


async def test_padded_wait_keeps_neither_its_connection_nor_the_place_of_a_large_request(
    flooded: EmbeddedService,
) -> None:
    """A request may wait for a job however long it is; what it says is small."""
    async with open_wire(flooded) as wire, trio.open_nursery() as nursery:
        job = await wire.start("sleep", "600")
        padding = " " * 60_000
        for number in range(-20, 0):
            await wire.socket.send_message(
                f'{{"jsonrpc":"2.0","id":{number},"method":"job.wait",{padding}'
                f'"params":{{"id":{job}}}}}'
            )
        with trio.fail_after(20):
            await wire.call("service.hello")
            async with open_wire(flooded) as other:
                big = {f"NAME{number}": "x" * 100 for number in range(500)}
                await other.call("job.plan", job={"command": ["true"], "environment": big})
        nursery.cancel_scope.cancel()
    async with open_wire(flooded) as wire:
        await wire.call("job.stop", id=job)


async def test_waits_and_follows_of_one_name_are_bounded_on_all_its_connections(
    open_directory: Callable[[], Path],
) -> None:
    settings = {"limits": {"max_waits": 10}}
    async with open_embedded(open_directory(), settings) as service, open_wire(service) as admin:
        job = await admin.start("sleep", "600")
        async with open_wire(service, "viewer") as one, open_wire(service, "viewer") as two:
            async with trio.open_nursery() as nursery:
                for wire in (one, two):
                    for _ in range(3):
                        nursery.start_soon(partial(wire.call, "job.wait", id=job))
                    for _ in range(2):
                        await wire.call("job.log", id=job, follow=True)
                await trio.sleep(0.2)
                for wire in (one, two):
                    with pytest.raises(Refused, match="does so 10 times already") as caught:
                        await wire.call("job.log", id=job, follow=True)
                    assert isinstance(caught.value.data, dict)
                    assert caught.value.data["name"] == "too_many_follows"
                    with pytest.raises(Refused, match="does so 10 times already"):
                        await wire.call("job.wait", id=job)
                with trio.fail_after(60):
                    await admin.call("job.stop", id=job, grace_seconds=0)
            ended = await admin.start("true")
            for wire in (one, two):
                for _ in range(11):
                    await wire.call("job.wait", id=ended)


async def test_client_that_takes_no_refusal_holds_up_no_end_of_the_service(
    open_directory: Callable[[], Path],
) -> None:
    async with open_embedded(open_directory(), {}) as service, AsyncExitStack() as stack:
        raw = await stack.enter_async_context(open_raw(service, buffer=2048))
        sent = 0
        with trio.move_on_after(3):
            while True:  # what is refused says what was asked for, so that replies are longer
                request = {"jsonrpc": "2.0", "id": sent, "method": f"{sent}{'x' * 400}"}
                await raw.send(frame(TEXT, json.dumps(request).encode()))
                sent += 1
        assert sent > 20, "the control: nothing more is read from it, since it takes nothing"
        service.process.send_signal(signal.SIGTERM)
        # server.stall_timeout is a minute
        await until(lambda: "INFO ended" in service.log_text())


def _is_told(service: EmbeddedService, times: int) -> bool:
    return service.log_text().count("message_too_large") == times


async def test_too_large_a_message_is_told_also_while_output_is_sent(
    open_directory: Callable[[], Path],
) -> None:
    async with open_embedded(open_directory(), {}) as service:
        for number in range(1, 4):
            async with open_socket(service) as socket, trio.open_nursery() as nursery:
                job = {"command": ["head", "-c", "20000000", "/dev/zero"]}
                call = {"jsonrpc": "2.0", "id": 1, "method": "job.run"}
                await socket.send_message(
                    json.dumps({**call, "params": {"job": job, "follow": {}}})
                )

                async def take(socket: WebSocketConnection = socket) -> None:
                    with suppress(ConnectionClosed):
                        while True:
                            await socket.get_message()

                nursery.start_soon(take)
                await trio.sleep(0.05)
                with suppress(ConnectionClosed):
                    await socket.send_message("x" * (5 * MEBIBYTE))
                await until(partial(_is_told, service, number))
                nursery.cancel_scope.cancel()
            await trio.sleep(1.1)  # the log has one of a kind in a second
