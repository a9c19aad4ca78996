"""Who gets in, who may do what, and what becomes of those who speak nonsense."""

import json
import re
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
import trio_websocket
import trustme
from attrs import evolve

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.pki.authority import Authority, Issued
from jobworker.pki.files import write_new

from ..services import open_embedded
from .conftest import until
from .wire import Refused, Wire, context_for, open_socket, open_wire

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")

VIEWER_MAY_NOT = [
    ("job.run", {"job": {"command": ["true"]}}),
    ("job.stop", {"id": 1}),
]


@pytest.mark.parametrize(("method", "params"), VIEWER_MAY_NOT)
async def test_viewer_may_not_touch(viewer: Wire, method: str, params: dict[str, object]) -> None:
    with pytest.raises(Refused) as refused:
        await viewer.call(method, **params)
    assert refused.value.code == 1002
    assert "viewer" in refused.value.message


async def test_viewer_may_look(viewer: Wire, admin: Wire) -> None:
    _, _, job = await admin.run("echo", "seen")
    assert await viewer.call("job.status", id=job["id"]) == {**job, "warnings": []}
    listed = await viewer.call("job.list", limit=1)
    assert listed["jobs"] == [job]
    result = await viewer.call("job.log", id=job["id"])
    assert (await viewer.output(result["subscription"]))[0] == b"seen\n"
    hello = await viewer.call("service.hello")
    assert (hello["name"], hello["role"]) == ("viewer-client", "viewer")


async def test_values_of_variables_are_not_for_viewers(viewer: Wire, admin: Wire) -> None:
    job = {"command": ["true"], "environment": {"TOKEN": "hunter2"}}
    number = (await admin.call("job.run", job=job))["job"]["id"]  # type: ignore[index]
    await admin.call("job.wait", id=number)
    mine = await admin.call("job.status", id=number)
    assert "hunter2" in json.dumps(mine)
    result = await viewer.call("job.log", id=number)
    seen = [
        await viewer.call("job.wait", id=number),
        await viewer.call("job.status", id=number),
        await viewer.call("job.list", limit=1),
        (await viewer.output(result["subscription"]))[2],
    ]
    for each in seen:
        assert "hunter2" not in json.dumps(each)
    assert seen[1]["spec"]["environment"] == {"TOKEN": "***"}  # type: ignore[index]


def handshake(service: EmbeddedService, context: ssl.SSLContext) -> None:
    """Connect and read: raises what TLS says."""
    host, port = service.address.rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        # In TLS 1.3 the refusal of a client's certificate arrives with the first read.
        assert secured.recv(1) == b"", "the server spoke first"


def trusting(service: EmbeddedService) -> ssl.SSLContext:
    """A context that trusts the service and has no certificate of its own."""
    return ssl.create_default_context(cafile=service.environment()["WORKER_CA_PATH"])


async def in_thread(service: EmbeddedService, context: ssl.SSLContext, reason: str) -> None:
    with pytest.raises(ssl.SSLError) as refused:
        await trio.to_thread.run_sync(handshake, service, context)
    assert reason in str(refused.value.reason).upper()


async def test_client_without_a_certificate_is_told_so(service: EmbeddedService) -> None:
    await in_thread(service, trusting(service), "CERTIFICATE_REQUIRED")


async def test_certificate_of_another_ca_is_refused(service: EmbeddedService) -> None:
    context = trusting(service)
    trustme.CA().issue_cert("stranger.example").configure_cert(context)
    await in_thread(service, context, "UNKNOWN_CA")


async def test_server_certificate_is_no_client_certificate(service: EmbeddedService) -> None:
    context = trusting(service)
    certs = service.directory / "certs"
    context.load_cert_chain(certs / "server-cert.pem", certs / "server-key.pem")
    await in_thread(service, context, "UNSUPPORTED_CERTIFICATE")


async def test_tls_1_2_is_refused(service: EmbeddedService) -> None:
    context = context_for(service)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    await in_thread(service, context, "PROTOCOL_VERSION")


def certificate_of(service: EmbeddedService, into: Path, issued: Issued) -> ssl.SSLContext:
    """A context with a certificate issued by the service's own authority."""
    write_new(into, issued.files("odd"))
    context = trusting(service)
    context.load_cert_chain(into / "odd-cert.pem", into / "odd-key.pem")
    return context


async def answer(service: EmbeddedService, context: ssl.SSLContext, request: bytes) -> bytes:
    """What the server says to bytes after the handshake, to the end of the connection."""
    host, port = service.address.rsplit(":", 1)
    stream = await trio.open_ssl_over_tcp_stream(
        host, int(port), ssl_context=context, https_compatible=True
    )
    said = b""
    try:
        with trio.fail_after(15):
            await stream.send_all(request)
            while data := await stream.receive_some(65_536):
                said += data
    except trio.BrokenResourceError:
        pass
    finally:
        await trio.aclose_forcefully(stream)
    return said


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
WHOLE = UPGRADE + b"Sec-WebSocket-Protocol: jobworker.v1\r\n\r\n"


@pytest.mark.parametrize("role", ["Admin", "root"])
async def test_role_that_does_not_exist_gets_nothing(
    service: EmbeddedService, open_directory: Callable[[], Path], role: str
) -> None:
    authority = Authority.load(service.directory / "certs")
    issued = authority.issue_client("odd", role, now=datetime.now(UTC))
    context = certificate_of(service, open_directory(), issued)
    request = UPGRADE + b"Sec-WebSocket-Protocol: jobworker.v1\r\n\r\n"
    said = await answer(service, context, request)
    assert said.startswith(b"HTTP/1.1 403 ")
    assert role.encode() in said


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"426"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b"426"),
        (b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (WHOLE.replace(b"GET / ", b"GET /jobs "), b"404"),
        (WHOLE.replace(b"GET / ", b"GET /?x "), b"404"),
        (WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0"), b"426"),
        (WHOLE.replace(b"Version: 13", b"Version: 8"), b"426"),
        (WHOLE.replace(b"Sec-WebSocket-Version: 13\r\n", b""), b"426"),
        (WHOLE.replace(b"Connection: Upgrade", b"Connection: close"), b"426"),
        (WHOLE.replace(b"GhlIHNhb", b""), b"400"),
        (WHOLE.replace(b"Sec-WebSocket-Key", b"X"), b"400"),
        (b"\x16\x03garbage\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000, b"431"),
        (UPGRADE + b"a:\r\n" * 100 + b"\r\n", b"431"),
        (UPGRADE + b"\r\n", b"400"),
        (UPGRADE + b"Sec-WebSocket-Protocol: jobworker.v1\r\n\r\n" + b"\xff" * 40, b"400"),
        (UPGRADE + b"Sec-WebSocket-Protocol: jobworker.v99\r\n\r\n", b"400"),
        (
            UPGRADE + b"Origin: https://evil.example\r\n"
            b"Sec-WebSocket-Protocol: jobworker.v1\r\n\r\n",
            b"403",
        ),
    ],
)
async def test_odd_request_gets_an_answer(
    service: EmbeddedService, request_: bytes, status: bytes
) -> None:
    said = await answer(service, context_for(service), request_)
    assert said.startswith(b"HTTP/1.1 " + status)
    error = json.loads(said.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"].startswith("cannot serve")
    assert not re.search(r"\bb'|bytearray", error["message"])
    assert error["remedy"]
    assert f"\n| {status.decode()} |" in PAGE
    if status != b"403":
        assert (error["code"], error["name"]) == (1050, "no_upgrade")


async def test_head_gets_a_status_and_no_body(service: EmbeddedService) -> None:
    request = b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n"
    said = await answer(service, context_for(service), request)
    assert said.startswith(b"HTTP/1.1 426")
    assert said.endswith(b"\r\n\r\n")


async def test_every_address_of_both_families_is_one_setting(
    open_directory: Callable[[], Path],
) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("needs IPv6")
    async with open_embedded(open_directory(), {"server": {"address": "::"}}) as both:
        port = int(both.address.rsplit(":", 1)[1])
        for address in ("127.0.0.1", "::1"):
            there = evolve(both, address=f"{address}:{port}")
            async with open_wire(there) as wire:
                assert (await wire.call("service.hello"))["role"] == "admin"
        await until(lambda: "127.0.0.1" in both.log_text())
        assert "ffff" not in both.log_text()


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03garbage\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000,
        UPGRADE + b"Sec-WebSocket-Protocol: jobworker.v1, \xff\r\n\r\n",
        UPGRADE.replace(b"Connection: Upgrade", b"Connection: \xff")
        + b"Sec-WebSocket-Protocol: jobworker.v1\r\n\r\n",
        UPGRADE.replace(b"Host: x", b"Host: xn--0")
        + b"Sec-WebSocket-Protocol: jobworker.v1\r\n\r\n",
    ],
)
async def test_nonsense_ends_its_own_connection_alone(
    service: EmbeddedService, admin: Wire, nonsense: bytes
) -> None:
    await answer(service, context_for(service), nonsense)
    assert (await admin.call("service.hello"))["role"] == "admin"
    async with open_wire(service) as another:
        await another.call("service.hello")


async def test_broken_frame_ends_its_own_connection(service: EmbeddedService, admin: Wire) -> None:
    host, port = service.address.rsplit(":", 1)
    stream = await trio.open_ssl_over_tcp_stream(
        host, int(port), ssl_context=context_for(service), https_compatible=True
    )
    try:
        await stream.send_all(UPGRADE + b"Sec-WebSocket-Protocol: jobworker.v1\r\n\r\n")
        await stream.receive_some(1000)
        await stream.send_all(b"\xff" * 40)
        with trio.fail_after(60):
            while await stream.receive_some(1000):
                pass
    finally:
        await trio.aclose_forcefully(stream)
    await admin.call("service.hello")


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("{", -32700),
        ('{"jsonrpc":"2.0","jsonrpc":"2.0","id":1,"method":"job.list"}', -32700),
        ('{"jsonrpc":"2.0","id":1,"method":"job.list","params":{"limit":NaN}}', -32700),
        ("[" * 100_000, -32700),
        ("[]", -32600),
        ("42", -32600),
        ('{"jsonrpc":"1.0","id":1,"method":"job.list"}', -32600),
        ('{"jsonrpc":"2.0","id":{},"method":"job.list"}', -32600),
        ('{"jsonrpc":"2.0","id":1,"method":"job.list","extra":1}', -32600),
        ('{"jsonrpc":"2.0","id":1,"method":"no.such"}', -32601),
        ('{"jsonrpc":"2.0","id":1,"method":"job.list","params":[1]}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"job.list","params":{"limit":"5"}}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"job.list","params":{"limit":true}}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"job.run","params":{"job":{"command":"ls"}}}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"job.run","params":{"job":{"command":[]}}}', -32602),
        ('{"jsonrpc":"2.0","id":1,"method":"job.run","params":{"job":{"command":[""]}}}', -32602),
        (
            '{"jsonrpc":"2.0","id":1,"method":"job.run",'
            '"params":{"job":{"command":["echo","a\\u0000b"]}}}',
            -32602,
        ),
        (
            '{"jsonrpc":"2.0","id":1,"method":"job.run",'
            '"params":{"job":{"command":["echo","\\ud800"]}}}',
            -32602,
        ),
        (b"binary", -32600),
    ],
)
async def test_bad_message_gets_its_error_and_the_connection_lives(
    service: EmbeddedService, message: str | bytes, code: int
) -> None:
    async with open_socket(service) as sock:
        await sock.send_message(message)
        with trio.fail_after(60):
            reply = json.loads(await sock.get_message())
        assert reply["error"]["code"] == code
        await sock.send_message('{"jsonrpc":"2.0","id":"after","method":"service.hello"}')
        assert json.loads(await sock.get_message())["id"] == "after"


async def test_two_megabytes_of_arguments_are_refused_by_name(admin: Wire) -> None:
    with pytest.raises(Refused) as refused:
        await admin.start("echo", *["x" * 100_000] * 20)
    assert refused.value.code == 1001
    assert "1048576" in refused.value.message
    with pytest.raises(Refused) as refused:
        await admin.start("echo", "x" * 200_000)
    assert refused.value.code == -32602


async def test_a_megabyte_of_arguments_arrives_whole(admin: Wire) -> None:
    out, _, _ = await admin.run("sh", "-c", 'printf %s "$*" | wc -c', "sh", *["y" * 99_999] * 10)
    assert int(out) == 999_999


async def test_message_beyond_the_bound_ends_its_connection_alone(
    service: EmbeddedService, admin: Wire
) -> None:
    async with open_socket(service) as sock:

        async def send_and_listen() -> None:
            await sock.send_message("x" * (5 << 20))
            await sock.get_message()

        with pytest.raises(trio_websocket.ConnectionClosed) as closed, trio.fail_after(20):
            await send_and_listen()
        assert closed.value.reason is None or closed.value.reason.code == 1009
    await admin.call("service.hello")


async def test_client_that_vanishes_costs_nothing(service: EmbeddedService) -> None:
    async with open_wire(service) as wire:
        descriptors = Path(f"/proc/{service.process.pid}/fd")
        before = len(list(descriptors.iterdir()))
        job = await wire.start("sh", "-c", "while true; do echo xxxxxxxxxxxxxxxx; done")
        for _ in range(20):
            host, port = service.address.rsplit(":", 1)
            stream = await trio.open_ssl_over_tcp_stream(
                host, int(port), ssl_context=context_for(service), https_compatible=True
            )
            await stream.send_all(UPGRADE + b"Sec-WebSocket-Protocol: jobworker.v1\r\n\r\n")
            await stream.receive_some(1000)
            await trio.aclose_forcefully(stream)
        await wire.call("job.stop", id=job)
        with trio.fail_after(60):
            while len(list(descriptors.iterdir())) > before:
                await wire.call("service.hello")
