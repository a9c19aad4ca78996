"""The HTTP request that opens a WebSocket: read and checked before any WebSocket code runs.

The head is read with h11, under the caller's deadline and within `MAX_HEAD_BYTES`. Then this module
checks the client's identity and what the request asks for. A refusal is an HTTP reply with the
reason as JSON. After that `PrefixStream` gives the bytes that were read to the WebSocket code.
"""

import math
import re
from collections.abc import Awaitable, Callable
from functools import partial

import h11
import trio
from attrs import define

from jobworker.errors import JobworkerError, NoUpgrade, PermissionDenied, SendStalled
from jobworker.model.access import Roles
from jobworker.pki.identity import Identity, identity
from jobworker.protocol.methods import SUBPROTOCOL
from jobworker.serialization.json_text import dumps
from jobworker.server.access.connected_clients import TlsState
from jobworker.server.connections.frame_scan import END_COST, RECORD_COST, FrameScanner
from jobworker.tls_stream import Data, TLSStream

PATH, VERSION = b"/", b"13"
_KEY = re.compile(rb"[A-Za-z0-9+/]{21}[AQgw]==")
_QUOTED = re.compile(r"bytearray\(b(.*)\)", re.DOTALL)
"""How h11 quotes a line."""
TOO_LONG = 431
MAX_HEAD_BYTES = 16_384
MAX_HEAD_LINES = 100
"""Common servers take as many. h11 reads 2,700 short lines of 16 KB in 6 ms, in which no other
client is served."""
_HEAD_END = re.compile(rb"\n\r?\n")
CLOSE_SECONDS = 2.0


class PrefixStream(trio.abc.Stream):
    """A stream that first returns bytes that were already read, and then WebSocket frames.

    It returns a few frames at a time (`frame_scan`), each time when a turn of the client's name has
    come. It takes a turn only for bytes that have come, not while it waits for the client.

    It sets `closed` when it is closed. If a client breaks the protocol, trio-websocket closes the
    stream without telling its caller, and a task that waits for a message would wait forever.
    """

    def __init__(
        self, inner: TLSStream, prefix: bytes, take_turn: Callable[[int], Awaitable[None]]
    ) -> None:
        """`take_turn` waits until bytes of a given cost may be read or handed over."""
        self._inner, self._prefix, self._take_turn = inner, prefix, take_turn
        inner.take_turn = partial(self._wait_for_turn, RECORD_COST)
        self._bound = trio.CancelScope()
        """The bound on the wait for the client's next bytes."""
        self._slice: bytes | None = None
        """The frames to hand over next."""
        self._unread = b""
        """The frames after those of `_slice` that have come."""
        self.frames = FrameScanner()
        self.closed = trio.Event()
        self.say_why: Callable[[], Awaitable[None]] | None = None
        """Called once, before this is closed: sends the closing frame if that is still owed."""
        self.check: Callable[[], Awaitable[float]] | None = None
        """Called before each read: checks the current message, and waits until more may be read.

        Returns the seconds after which to call it again. Raises BrokenResourceError.
        """

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio.abc.ReceiveStream."""
        if self.check is not None:
            while (seconds := await self.check()) < math.inf:
                with trio.move_on_after(seconds) as self._bound:
                    return await self._receive_some(max_bytes)
        return await self._receive_some(max_bytes)

    async def _receive_some(self, max_bytes: int | None) -> bytes:
        if self._prefix:
            await trio.lowlevel.checkpoint()
            size = len(self._prefix) if max_bytes is None else max_bytes
            given, self._prefix = self._prefix[:size], self._prefix[size:]
            return given
        if self._slice is None:  # else the last call was cancelled while it waited for its turn
            if self._unread:
                await trio.lowlevel.checkpoint()
                data = self._unread
            else:
                data = await self._receive(max_bytes)
            count = self.frames.slice(data)
            self._slice, self._unread = data[:count], data[count:]
        await self._wait_for_turn(self.frames.cost)
        data, self._slice = self._slice, None
        return data

    async def _receive(self, max_bytes: int | None) -> bytes:
        try:
            return await self._inner.receive_some(max_bytes)
        except trio.BrokenResourceError:
            await self._wait_for_turn(END_COST)
            raise

    async def _wait_for_turn(self, cost: int) -> None:
        """Wait for a turn for bytes that have come; the bound on the client does not run."""
        deadline, self._bound.deadline = self._bound.deadline, math.inf
        try:
            await self._take_turn(cost)
        finally:
            self._bound.deadline = deadline  # as before: empty TLS records must not extend it

    async def send_all(self, data: Data, *more: Data) -> None:
        """See `TLSStream.send_all`. Raises SendStalled in place of trio.TooSlowError."""
        try:
            await self._inner.send_all(data, *more)
        except trio.TooSlowError:
            seconds = self._inner.stall_seconds
            raise SendStalled(f"cannot send: the client took nothing for {seconds:g} s") from None

    @property
    def taken_bytes(self) -> int:
        """See `TLSStream.taken_bytes`."""
        return self._inner.taken_bytes

    async def wait_send_all_might_not_block(self) -> None:
        """See trio.abc.SendStream."""
        await self._inner.wait_send_all_might_not_block()

    def part(self) -> None:
        """Break the reference cycles of this stream, once the connection has ended.

        The conversation refers to the stream, which calls it. The TLS stream below calls this one.
        Python collects cycles seldom, and until then the connection's memory would stay in use.
        """
        self.check = self.say_why = None
        self._inner.take_turn = partial(self._take_turn, RECORD_COST)

    async def aclose(self) -> None:
        """See trio.abc.AsyncResource."""
        say_why, self.say_why = self.say_why, None
        if say_why is not None:
            await say_why()
        self.closed.set()
        self._inner.finish()  # `serve_connection` waits for the client's end and then closes it
        await trio.lowlevel.checkpoint()


class UpgradeRefused(Exception):
    """The request is refused: the reply has an HTTP status, and no WebSocket is opened."""

    def __init__(self, status: int, error: JobworkerError) -> None:
        super().__init__(status, error)
        self.status, self.error = status, error


@define(eq=False)
class RequestHead:
    """A request head as h11 has read it."""

    request: h11.Request
    connection: h11.Connection

    def value(self, name: bytes) -> bytes:
        """A header's value, b"" if it is absent; values of repeated headers are joined."""
        return b", ".join(value for key, value in self.request.headers if key == name)

    def tokens(self, name: bytes, *, fold: bool = True) -> list[bytes]:
        """The elements of a header that is a list; in lower case, unless `fold` is false."""
        value = self.value(name)
        return [each.strip() for each in (value.lower() if fold else value).split(b",")]


def http_connection() -> h11.Connection:
    """A parser for one request, which also writes the reply if the request is refused."""
    return h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)


async def read_head(stream: TLSStream, connection: h11.Connection) -> tuple[bytes, RequestHead]:
    """Read an HTTP request's head. Returns its bytes and the parsed head.

    Raises Refused if the bytes are no HTTP/1.1 request, or have more than `MAX_HEAD_BYTES` or
    `MAX_HEAD_LINES`.
    """
    raw = b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            why = "it is not HTTP/1.1: " + _QUOTED.sub(r"\1", str(error))
            if error.error_status_hint == TOO_LONG:
                why = f"its head has more than {MAX_HEAD_BYTES} bytes"
            raise _no_upgrade(error.error_status_hint, why) from None
        if isinstance(event, h11.Request):
            return raw, RequestHead(event, connection)
        if event is not h11.NEED_DATA:
            raise trio.BrokenResourceError("the client closed before it asked for anything")
        data = await stream.receive_some()
        raw += data
        if _HEAD_END.split(raw, 1)[0].count(b"\n") > MAX_HEAD_LINES:
            raise _no_upgrade(TOO_LONG, f"its head has more than {MAX_HEAD_LINES} lines")
        connection.receive_data(data)


def find_identity(
    stream: TLSStream, roles: Roles, tls_state: TlsState
) -> Identity | PermissionDenied:
    """The identity in the client's certificate, or the error if it has none with a known role."""
    try:
        who = identity(stream.peer_certificate, tls_state.subjects)
        roles.find(who.role)
    except PermissionDenied as error:
        return error
    return who


def accept_upgrade(
    who: Identity | PermissionDenied, head: RequestHead, tls_state: TlsState
) -> Identity:
    """The identity of a client whose request may be upgraded; raises Refused."""
    if isinstance(who, PermissionDenied):
        raise UpgradeRefused(403, who)
    origin, host = head.value(b"origin"), head.value(b"host")
    if origin and origin != b"https://" + host:
        told = PermissionDenied(
            "cannot serve a page of another origin",
            remedy="use a page of the same origin as this port, or a client outside a browser",
        )
        raise UpgradeRefused(403, told)
    if origin and not tls_state.hosts.hold(host.decode("latin-1")):
        rebound = "cannot serve a page of a name that the server's certificate does not bear"
        remedy = (
            "dial a name that it bears, or add one: worker certs renew server --host NAME --dir DIR"
        )
        raise UpgradeRefused(421, PermissionDenied(rebound, remedy=remedy))
    _check_upgrade(head)
    if head.connection.trailing_data[0]:
        early = "cannot serve the request: the client sent more before the reply"
        raise UpgradeRefused(400, NoUpgrade(early, remedy="wait for the reply to the upgrade"))
    return who


def _check_upgrade(head: RequestHead) -> None:
    """Raise Refused if the request opens no WebSocket of this protocol (RFC 6455, section 4.2.1).

    This checks everything, since the WebSocket code would refuse a request without a reason.
    """
    request = head.request
    if request.target != PATH:
        target = request.target[:80].decode("latin-1")
        raise _no_upgrade(404, f"there is nothing at {target!r}, only at {PATH.decode()!r}")
    upgrade = head.tokens(b"upgrade"), head.tokens(b"connection")
    if request.method != b"GET" or b"websocket" not in upgrade[0] or b"upgrade" not in upgrade[1]:
        raise _no_upgrade(426, "this port speaks WebSocket, and the request asks for no upgrade")
    if request.http_version != b"1.1":
        raise _no_upgrade(426, "an upgrade needs HTTP/1.1")
    if head.value(b"sec-websocket-version").strip() != VERSION:
        raise _no_upgrade(426, "its Sec-WebSocket-Version is not 13")
    if not _KEY.fullmatch(head.value(b"sec-websocket-key").strip()):
        raise _no_upgrade(400, "its Sec-WebSocket-Key is not 16 bytes in base64")
    if SUBPROTOCOL.encode() not in head.tokens(b"sec-websocket-protocol", fold=False):
        raise _no_upgrade(400, f"it does not propose the subprotocol {SUBPROTOCOL}")


def _no_upgrade(status: int, why: str) -> UpgradeRefused:
    remedy = (
        f"use worker-cli, or a WebSocket client with path {PATH.decode()} and subprotocol "
        f"{SUBPROTOCOL}: see docs/protocol.md"
    )
    return UpgradeRefused(status, NoUpgrade(f"cannot serve the request: {why}", remedy=remedy))


def plain_reply() -> bytes:
    """The reply to an HTTP request that came without TLS; it is sent without TLS too."""
    told = NoUpgrade(
        "cannot serve the request: this port speaks TLS, and it came in plain HTTP",
        remedy="dial wss:// with a client certificate, or use worker-cli: see docs/protocol.md",
    )
    return _written(http_connection(), UpgradeRefused(400, told))


async def reply(
    stream: TLSStream, connection: h11.Connection, refused: UpgradeRefused, *, without_body: bool
) -> None:
    """Send the reply to a refused request: JSON with the reason and a remedy."""
    await stream.send_all(_written(connection, refused, without_body=without_body))


def _written(
    connection: h11.Connection, refused: UpgradeRefused, *, without_body: bool = False
) -> bytes:
    error = refused.error
    told = {
        "code": error.code,
        "name": error.name,
        "message": error.message,
        "remedy": error.remedy,
    }
    body = dumps({"error": told}).encode()
    headers = [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    if refused.status == 426:
        headers += [("upgrade", "websocket"), ("sec-websocket-version", VERSION.decode())]
    events: list[h11.Event] = [h11.Response(status_code=refused.status, headers=headers)]
    if not without_body:  # a reply to HEAD has no body: RFC 9110, section 9.3.2
        events += [h11.Data(data=body), h11.EndOfMessage()]
    data = [connection.send(event) for event in events]
    return b"".join(piece for piece in data if piece)
