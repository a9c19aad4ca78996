"""Dialling real servers on loopback: whatever they do, the caller is told at once and in words."""

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, TypedDict

import pytest
import trio
import trio_websocket
from attrs import evolve, frozen

import jobworker
from jobworker.client import calls
from jobworker.client.address import Address
from jobworker.client.dial import Connection, serve_connection
from jobworker.errors import (
    CertificateRefused,
    ConnectionFailed,
    HostUnknown,
    InvalidParams,
    JobworkerError,
    PermissionDenied,
    ServerUntrusted,
)
from jobworker.model.lifecycle import State
from jobworker.pki.administration import init_authority
from jobworker.pki.server_files import ServerFiles
from jobworker.pki.tls import client_context, server_context
from jobworker.protocol.methods import SUBPROTOCOL
from jobworker.protocol.session import RpcRequest, ServerSession

from ..unit.client.memory_servers import RECORD

Handler = Callable[[trio.SocketStream], Awaitable[None]]
TLSHandler = Callable[["trio.SSLStream[trio.SocketStream]"], Awaitable[None]]


class Files(TypedDict):
    ca: Path
    certificate: Path
    key: Path


@frozen
class Site:
    """The files of an authority, its server and its clients."""

    directory: Path

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.pem"

    def files(self) -> Files:
        return {
            "ca": self.path("ca-cert"),
            "certificate": self.path("admin-client-cert"),
            "key": self.path("admin-client-key"),
        }

    def server(self) -> ssl.SSLContext:
        files = ServerFiles.read(
            ca=self.path("ca-cert"),
            certificate=self.path("server-cert"),
            key=self.path("server-key"),
        )
        return server_context(files)

    def client(self) -> ssl.SSLContext:
        return client_context(**self.files())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    directory = tmp_path_factory.mktemp("site") / "certs"
    init_authority(directory, [], now=datetime.now(UTC))
    return Site(directory)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Site:
    directory = tmp_path_factory.mktemp("stranger") / "certs"
    init_authority(directory, [], now=datetime.now(UTC))
    return Site(directory)


@asynccontextmanager
async def listening(handler: Handler, host: str = "127.0.0.1") -> AsyncIterator[Address]:
    """A TCP server that gives each connection to `handler`, and then closes it."""

    async def serve(stream: trio.SocketStream) -> None:
        try:
            await handler(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        finally:
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host=host)
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield Address(host, listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


def over_tls(context: ssl.SSLContext, handler: TLSHandler) -> Handler:
    """A handler for what comes after a TLS handshake."""

    async def serve(tcp: trio.SocketStream) -> None:
        stream = trio.SSLStream(tcp, context, server_side=True, https_compatible=True)
        await stream.do_handshake()
        await handler(stream)

    return serve


def answering(answer: bytes) -> TLSHandler:
    """Read a request and answer with these bytes."""

    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        await stream.receive_some(65536)
        await stream.send_all(answer)
        await stream.receive_some(1)  # the client closes first: nothing is reset under way

    return serve


async def refusing(tcp: trio.SocketStream, context: ssl.SSLContext) -> None:
    """Refuse in the handshake, with an alert (that trio itself would not send)."""
    stream = trio.SSLStream(tcp, context, server_side=True)
    with pytest.raises(trio.BrokenResourceError):
        await stream.do_handshake()
    await tcp.send_all(stream._outgoing.read())
    await tcp.send_eof()
    while await tcp.receive_some():
        pass


async def upgraded(
    stream: trio.abc.Stream,
    use: Callable[[trio_websocket.WebSocketConnection], Awaitable[None]],
    subprotocol: str | None = SUBPROTOCOL,
) -> None:
    """Accept a WebSocket and use it."""
    async with trio.open_nursery() as nursery:
        request = await trio_websocket.wrap_server_stream(nursery, stream)
        websocket = await request.accept(subprotocol=subprotocol)
        await use(websocket)
        await websocket.aclose()
        nursery.cancel_scope.cancel()


async def failure(address: Address, tls: ssl.SSLContext) -> JobworkerError:
    """What dialling raises, without any wait for a time-out."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            try:
                await nursery.start(serve_connection, address, tls)
            except JobworkerError as error:
                return error
            finally:
                nursery.cancel_scope.cancel()
    raise AssertionError("the connection was made")


async def test_nothing_listens(site: Site) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        error = await failure(Address("127.0.0.1", unused.getsockname()[1]), site.client())
    assert isinstance(error, ConnectionFailed)
    assert "Connection refused; is `worker serve` running" in str(error)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 70])
async def test_name_that_does_not_resolve(site: Site, host: str) -> None:
    error = await failure(Address(host), site.client())
    assert isinstance(error, HostUnknown)
    assert host in error.message


async def test_server_that_closes_at_once(site: Site) -> None:
    async def close(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)

    async with listening(close) as address:
        assert isinstance(await failure(address, site.client()), ConnectionFailed)


async def test_server_without_tls(site: Site) -> None:
    async def plain(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await stream.receive_some(1)

    async with listening(plain) as address:
        error = await failure(address, site.client())
    assert isinstance(error, ConnectionFailed)
    assert "does not speak TLS" in error.message


async def test_certificate_of_another_ca_is_refused_at_once(site: Site, stranger: Site) -> None:
    context = ssl.create_default_context(cafile=site.path("ca-cert"))
    context.load_cert_chain(stranger.path("admin-client-cert"), stranger.path("admin-client-key"))
    async with listening(lambda tcp: refusing(tcp, site.server())) as address:
        error = await failure(address, context)
    assert isinstance(error, CertificateRefused)
    assert "not from the server's CA" in error.message


async def test_missing_certificate_is_refused_at_once(site: Site) -> None:
    context = ssl.create_default_context(cafile=site.path("ca-cert"))
    async with listening(lambda tcp: refusing(tcp, site.server())) as address:
        error = await failure(address, context)
    assert isinstance(error, CertificateRefused)
    assert "asks for a client certificate" in error.message


async def test_server_of_another_ca_is_not_trusted(site: Site, stranger: Site) -> None:
    async with listening(over_tls(stranger.server(), answering(b""))) as address:
        assert isinstance(await failure(address, site.client()), ServerUntrusted)


async def test_server_of_another_name_is_not_trusted(site: Site) -> None:
    # All of 127/8 is loopback on Linux; the certificate names 127.0.0.1 alone.
    async with listening(over_tls(site.server(), answering(b"")), "127.0.0.2") as address:
        error = await failure(address, site.client())
    assert isinstance(error, ServerUntrusted)
    assert "127.0.0.2" in error.message


async def test_server_that_closes_after_the_handshake(site: Site) -> None:
    async def close(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        await stream.receive_some(65536)

    async with listening(over_tls(site.server(), close)) as address:
        error = await failure(address, site.client())
    assert isinstance(error, ConnectionFailed)
    assert "closed the connection" in error.message


async def test_refusal_in_http_is_raised_as_what_it_says(site: Site) -> None:
    body = b'{"error":{"code":1002,"message":"cannot serve you: no role","remedy":"ask"}}'
    head = b"HTTP/1.1 403 Forbidden\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with listening(over_tls(site.server(), answering(head + body))) as address:
        error = await failure(address, site.client())
    assert isinstance(error, PermissionDenied)
    assert str(error) == "cannot serve you: no role; ask"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 6\r\n\r\nnot\nus", "HTTP 404: not us"),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n", "HTTP 500"),
        (b'HTTP/1.1 403 No\r\ncontent-length: 9\r\n\r\n{"error":', "HTTP 403"),
        (b"220 mail.example.org ESMTP\r\n\r\n", "does not speak jobworker.v1"),
        (b"\xff\xfe" * 20_000, "does not speak jobworker.v1"),
    ],
)
async def test_another_kind_of_server(site: Site, answer: bytes, words: str) -> None:
    async with listening(over_tls(site.server(), answering(answer))) as address:
        error = await failure(address, site.client())
    assert isinstance(error, ConnectionFailed)
    assert words in error.message


async def test_websocket_without_our_subprotocol(site: Site) -> None:
    async def other(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        await upgraded(stream, lambda websocket: websocket.ping(), subprotocol=None)

    async with listening(over_tls(site.server(), other)) as address:
        error = await failure(address, site.client())
    assert isinstance(error, ConnectionFailed)
    assert "does not speak jobworker.v1" in error.message


async def test_silent_server_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stay_silent(_: trio.SocketStream) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(calls, "CONNECT_SECONDS", 0.2)
    async with listening(stay_silent) as address:
        with pytest.raises(ConnectionFailed, match=r"no answer within .* check the address \("):
            async with jobworker.open_client(address, **site.files()):
                raise AssertionError("the connection was made")


async def test_bad_address_is_refused(site: Site) -> None:
    with pytest.raises(InvalidParams, match="port"):
        async with jobworker.open_client("host:0", **site.files()):
            raise AssertionError("the connection was made")


@pytest.mark.parametrize("address", ["no.such.host.invalid", "127.0.0.1:1"])
async def test_remedy_of_an_address_is_for_every_caller(site: Site, address: str) -> None:
    with pytest.raises(ConnectionFailed) as caught:
        async with jobworker.open_client(address, **site.files()):
            raise AssertionError("the connection was made")
    assert "the address (for worker-cli: --server " in caught.value.remedy


async def echo(websocket: trio_websocket.WebSocketConnection) -> None:
    try:
        while True:
            await websocket.send_message(await websocket.get_message())
    except trio_websocket.ConnectionClosed:
        return


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_messages_pass_both_ways(site: Site, host: str) -> None:
    handler = over_tls(site.server(), lambda stream: upgraded(stream, echo))
    async with listening(handler, host) as address, trio.open_nursery() as nursery:
        connection: Connection = await nursery.start(serve_connection, address, site.client())
        await connection.send("hello")
        assert await connection.receive() == "hello"
        await connection.aclose()
        with pytest.raises(ConnectionFailed):
            await connection.receive()
        assert not connection.is_ended


async def test_server_that_goes_away_is_told_with_its_reason(site: Site) -> None:
    async def leave(websocket: trio_websocket.WebSocketConnection) -> None:
        await websocket.aclose(1001, "shutting down")

    handler = over_tls(site.server(), lambda stream: upgraded(stream, leave))
    async with (
        listening(handler) as address,
        jobworker.open_client(address, patience_seconds=0, **site.files()) as client,
    ):
        with pytest.raises(ConnectionFailed, match=r"closed it \(1001 shutting down\)"):
            await client.job(7).status()
        assert client._calls._rpc is not None
        assert client._calls._rpc.connection.is_ended


async def test_connection_that_breaks_wakes_the_caller(site: Site) -> None:
    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        async def cut(websocket: trio_websocket.WebSocketConnection) -> None:
            await websocket.get_message()
            await trio.aclose_forcefully(stream)

        await upgraded(stream, cut)

    async with (
        listening(over_tls(site.server(), serve)) as address,
        jobworker.open_client(address, patience_seconds=0, **site.files()) as client,
    ):
        with pytest.raises(ConnectionFailed, match="broke"), trio.fail_after(60):
            await client.job(7).status()


async def test_what_the_caller_raises_passes_as_it_is(site: Site) -> None:
    def fail() -> NoReturn:
        raise KeyError("mine")

    handler = over_tls(site.server(), lambda stream: upgraded(stream, echo))
    async with listening(handler) as address:
        with pytest.raises(KeyError, match="mine"):
            async with jobworker.open_client(address, **site.files()):
                fail()


async def test_cancelled_caller_leaves_at_once(site: Site) -> None:
    handler = over_tls(site.server(), lambda stream: upgraded(stream, echo))
    async with listening(handler) as address:
        before = trio.current_time()
        with trio.CancelScope() as scope:
            async with jobworker.open_client(address, **site.files()):
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert trio.current_time() - before < 0.9  # no farewell is waited for


async def answer_status(websocket: trio_websocket.WebSocketConnection) -> None:
    """Answer each call with a record that has ended, after a while."""
    ended = evolve(RECORD, state=State.STOPPED)
    session = ServerSession()
    try:
        while True:
            call = session.receive(await websocket.get_message())
            assert isinstance(call, RpcRequest)
            await trio.sleep(0.2)
            await websocket.send_message(session.result(call.id, ended))
    except trio_websocket.ConnectionClosed:
        return


async def test_cancelled_caller_may_still_stop_its_job(site: Site) -> None:
    handler = over_tls(site.server(), lambda stream: upgraded(stream, answer_status))
    told = None
    async with listening(handler) as address:
        with trio.fail_after(20), trio.CancelScope() as scope:
            async with jobworker.open_client(address, **site.files()) as client:
                try:
                    scope.cancel()
                    await trio.sleep_forever()
                finally:
                    with trio.move_on_after(10, shield=True):
                        told = await client.job(7).stop()
    assert scope.cancelled_caught
    assert told is not None
    assert told.state is State.STOPPED


class Other(BaseException):
    """One of those that are no Exception."""


@pytest.mark.parametrize(
    "raised",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        Other(),
        ValueError("x"),
        ExceptionGroup("y", [OSError()]),
    ],
    ids=lambda raised: type(raised).__name__,
)
async def test_what_ends_the_block_comes_out_as_it_is(site: Site, raised: BaseException) -> None:
    handler = over_tls(site.server(), lambda stream: upgraded(stream, echo))
    async with listening(handler) as address:
        caught: BaseException | None = None
        try:
            async with jobworker.open_client(address, **site.files()):
                raise raised
        except BaseException as error:  # noqa: BLE001 - whatever it is
            caught = error
        assert caught is raised


RAISED_BY_CALLBACKS = pytest.mark.parametrize(
    "raised", [SystemExit(3), RuntimeError("x")], ids=lambda raised: type(raised).__name__
)


@RAISED_BY_CALLBACKS
@pytest.mark.parametrize("shield", [False, True])
async def test_what_on_lost_raises_comes_out_as_it_is(
    site: Site, raised: BaseException, shield: bool
) -> None:
    def fail(_: JobworkerError) -> NoReturn:
        raise raised

    async def leave(websocket: trio_websocket.WebSocketConnection) -> None:
        await websocket.aclose(1001, "shutting down")

    handler = over_tls(site.server(), lambda stream: upgraded(stream, leave))
    async with listening(handler) as address:
        caught: BaseException | None = None
        try:
            async with jobworker.open_client(address, on_lost=fail, **site.files()) as client:
                with trio.CancelScope(shield=shield), trio.fail_after(20):
                    await client.job(7).status()
        except BaseException as error:  # noqa: BLE001 - whatever it is
            caught = error
        assert caught is raised


@RAISED_BY_CALLBACKS
async def test_what_on_refused_raises_comes_out_as_it_is(site: Site, raised: BaseException) -> None:
    def fail(_: JobworkerError) -> NoReturn:
        raise raised

    caught: BaseException | None = None
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", unused.getsockname()[1])
        opened = jobworker.open_client(
            address, on_refused=fail, start_patience_seconds=20, **site.files()
        )
        try:
            async with opened:
                raise AssertionError("the connection was made")
        except BaseException as error:  # noqa: BLE001 - whatever it is
            caught = error
    assert caught is raised
