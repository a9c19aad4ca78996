"""Dialling: how each failure is told, and what of it a caller can do."""

import json
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing
from attrs import define, field

from jobworker.client import dial
from jobworker.client.address import Address
from jobworker.client.dial import CLOSE_SECONDS, Connection, serve_connection
from jobworker.client.websocket import LOST, Closed, Rejected, Violation, WebSocket
from jobworker.errors import (
    CertificateRefused,
    ConnectionFailed,
    HostUnknown,
    JobworkerError,
    MessageTooLarge,
    NoService,
    PermissionDenied,
    ProtocolError,
)
from jobworker.tls_stream import TLSStream

ADDRESS = Address("host", 5000)


@define(eq=False)
class PlayedWebSocket:
    """Raises what a test says."""

    failure: Exception | None = None
    closed: trio.Event = field(factory=trio.Event)
    says_goodbye: bool = True
    sent: list[str] = field(factory=list)

    async def send(self, message: str) -> None:
        await self._fail()
        self.sent.append(message)

    async def receive(self) -> str:
        await self._fail()
        return "message"

    async def aclose(self) -> None:
        if not self.says_goodbye:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        self.closed.set()

    async def _fail(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure


def connection(failure: Exception | None = None) -> Connection:
    return Connection(cast(WebSocket, PlayedWebSocket(failure)), ADDRESS)


def caused(failure: Exception, cause: BaseException) -> Exception:
    failure.__cause__ = cause
    return failure


# --- the end of a connection ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason", "kind", "ended", "words"),
    [
        (1000, "", ConnectionFailed, False, "broke: the server closed it (1000)"),
        (1001, "it ends", ConnectionFailed, True, "the server closed it (1001 it ends)"),
        (1002, "bad", ProtocolError, False, "cannot go on: the server closed it (1002 bad)"),
        (1008, "certificate_refused: it is revoked", CertificateRefused, False, ": it is revoked"),
        (1009, "at most 5", MessageTooLarge, False, "at most 5"),
        (1009, "", MessageTooLarge, False, "it names no bound"),
        (1012, "", ConnectionFailed, True, "(1012)"),
        (1013, "busy", ConnectionFailed, False, "(1013 busy)"),
        (4999, "", ConnectionFailed, False, "(4999)"),
        (LOST, "", ConnectionFailed, False, "broke: the server closed it"),
    ],
)
async def test_closing_frame_says_what_the_client_may_do(
    code: int, reason: str, kind: type[JobworkerError], words: str, *, ended: bool
) -> None:
    open_one = connection(Closed(code, reason))
    with pytest.raises(JobworkerError) as received:
        await open_one.receive()
    with pytest.raises(JobworkerError) as sent:
        await open_one.send("message")
    for told in (received.value, sent.value):
        assert type(told) is kind
        assert told.message.endswith(words)
        assert "certificate_refused" not in told.message
        assert told.__suppress_context__
    assert open_one.is_ended is ended


async def test_server_that_breaks_the_protocol_is_told_so() -> None:
    with pytest.raises(ProtocolError, match=r"violates the protocol \(a bad frame\)") as told:
        await connection(Violation("a bad frame")).receive()
    assert told.value.remedy == "do client and server have the same version?"


@pytest.mark.parametrize("kind", [trio.BrokenResourceError, trio.ClosedResourceError])
async def test_broken_connection_is_told_with_the_systems_reason(kind: type[Exception]) -> None:
    failure = caused(kind(), OSError(104, "any"))
    with pytest.raises(ConnectionFailed, match="to host:5000 broke: Connection reset by") as told:
        await connection(failure).receive()
    assert told.value.remedy == "jobs go on without it; connect again"


async def test_messages_pass_as_they_are() -> None:
    open_one = connection()
    await open_one.send("question")
    assert await open_one.receive() == "message"
    assert cast(PlayedWebSocket, open_one._socket).sent == ["question"]


async def test_goodbye_takes_a_second_at_most_even_if_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    open_one, began = connection(), trio.current_time()
    cast(PlayedWebSocket, open_one._socket).says_goodbye = False
    with trio.CancelScope() as scope:
        scope.cancel()
        await open_one.aclose()
    assert trio.current_time() - began == pytest.approx(CLOSE_SECONDS)


# --- TCP ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), HostUnknown, "cannot resolve 'host'"),
        (UnicodeError("label too long"), HostUnknown, "it is not a host name"),
        (OSError(111, "any"), ConnectionFailed, "host:5000: Connection refused"),
        (OSError("something"), ConnectionFailed, "host:5000: something"),
        (
            caused(
                OSError("all attempts failed"),
                ExceptionGroup("", [OSError(111, ""), OSError(113, ""), OSError(111, "")]),
            ),
            ConnectionFailed,
            "host:5000: Connection refused, No route to host",
        ),
    ],
)
async def test_unreachable_server_is_told_why(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, kind: type[JobworkerError], words: str
) -> None:
    async def fail(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise failure

    monkeypatch.setattr(trio, "open_tcp_stream", fail)
    with pytest.raises(kind) as told:
        await serve_connection(ADDRESS, ssl.create_default_context())
    assert type(told.value) is kind
    assert words in told.value.message
    assert told.value.message.count("refused") <= 1
    assert "WORKER_SERVER" in told.value.remedy


# --- TLS and HTTP ---------------------------------------------------------------------------


@define(eq=False)
class Line:
    """A TCP connection that knows whether it is open."""

    is_open: bool = True

    async def do_handshake(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.is_open = False
        await trio.lowlevel.checkpoint()


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    line = Line()

    async def reach(_: Address) -> Line:
        await trio.lowlevel.checkpoint()
        return line

    def secure(tcp: Line, *_: object, server_name: str, receive_bytes: int) -> TLSStream:
        assert server_name == ADDRESS.server_name
        return cast(TLSStream, tcp)

    monkeypatch.setattr(dial, "_reach", reach)
    monkeypatch.setattr(dial, "TLSStream", secure)
    return line


def answering(
    monkeypatch: pytest.MonkeyPatch, answer: Exception | PlayedWebSocket
) -> Callable[[], Awaitable[None]]:
    async def upgrade(*_: object) -> PlayedWebSocket:
        await trio.lowlevel.checkpoint()
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(dial, "upgrade", upgrade)
    return lambda: serve_connection(ADDRESS, ssl.create_default_context())


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (Closed(), ConnectionFailed, "(it closed the connection)"),
        (trio.BrokenResourceError(), ConnectionFailed, "(it closed the connection)"),
        (Violation("it talks"), NoService, "does not speak jobworker.v1 (it talks)"),
        (
            caused(trio.BrokenResourceError(), OSError(104, "")),
            ConnectionFailed,
            "the server broke the connection (Connection reset by peer)",
        ),
        (
            caused(trio.BrokenResourceError(), ValueError()),
            ConnectionFailed,
            "the server broke the connection (the connection broke)",
        ),
        (Rejected(404, b" <p>not\n here</p> "), NoService, "HTTP 404: <p>not here</p>"),
        (Rejected(503, b""), NoService, "the server answered HTTP 503"),
        (Rejected(503, b"x" * 300), NoService, "HTTP 503: " + "x" * 200),
        (Rejected(403, b"\xff{"), NoService, "HTTP 403: \ufffd{"),
        (Rejected(403, b'{"error": 5}'), NoService, "HTTP 403"),
        (Rejected(403, b"[1]"), NoService, "HTTP 403: [1]"),
        (Rejected(403, b'{"error": {"code": true, "message": "m"}}'), NoService, "HTTP 403"),
        (Rejected(403, b'{"error": {"code": 1002, "message": 5}}'), NoService, "HTTP 403"),
        (
            Rejected(403, b'{"error": {"code": 1002, "message": "m", "remedy": 5}}'),
            NoService,
            "HTTP 403",
        ),
    ],
)
async def test_refusal_is_told_in_words_and_closes_the_line(
    monkeypatch: pytest.MonkeyPatch,
    line: Line,
    failure: Exception,
    kind: type[JobworkerError],
    words: str,
) -> None:
    with pytest.raises(kind) as told:
        await answering(monkeypatch, failure)()
    assert type(told.value) is kind
    assert "cannot connect to host:5000: " in told.value.message
    assert words in told.value.message
    assert "x" * 201 not in told.value.message
    assert told.value.remedy
    assert not line.is_open


async def test_error_of_the_server_is_raised_as_its_class(
    monkeypatch: pytest.MonkeyPatch, line: Line
) -> None:
    error = {"code": PermissionDenied.code, "message": "cannot serve you", "remedy": "ask"}
    rejected = Rejected(403, json.dumps({"error": error}).encode())
    with pytest.raises(PermissionDenied, match="cannot serve you; ask"):
        await answering(monkeypatch, rejected)()
    del error["remedy"]
    rejected = Rejected(403, json.dumps({"error": error}).encode())
    with pytest.raises(PermissionDenied, match=r"cannot serve you$"):
        await answering(monkeypatch, rejected)()


async def test_refusal_of_a_certificate_is_told_with_its_cause(
    monkeypatch: pytest.MonkeyPatch, line: Line, tmp_path: Path
) -> None:
    looked = list[object]()

    def with_cause(refusal: JobworkerError, own: Path) -> JobworkerError:
        looked.append((type(refusal), own))
        return CertificateRefused("cannot connect: it has expired")

    monkeypatch.setattr(dial, "with_cause", with_cause)
    alert = ssl.SSLError(1, "alert")
    alert.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    serve = answering(monkeypatch, caused(trio.BrokenResourceError(), alert))
    with pytest.raises(CertificateRefused):
        await serve()
    assert not looked, "there is no file to look at"
    with pytest.raises(CertificateRefused, match="it has expired"):
        await serve_connection(ADDRESS, ssl.create_default_context(), own=tmp_path)
    assert looked == [(CertificateRefused, tmp_path)]


async def test_line_is_kept_until_the_connection_is_closed(
    monkeypatch: pytest.MonkeyPatch, line: Line
) -> None:
    socket_ = PlayedWebSocket()
    answering(monkeypatch, socket_)
    async with trio.open_nursery() as nursery:
        opened = await nursery.start(serve_connection, ADDRESS, ssl.create_default_context())
        assert isinstance(opened, Connection)
        await trio.testing.wait_all_tasks_blocked()
        assert line.is_open
        await opened.aclose()
    assert not line.is_open
