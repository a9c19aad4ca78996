"""One connection to a server, from its name to its last message; here alone stands trio-websocket.

    name ─► TCP ─► TLS 1.3 ─► HTTP upgrade ─► messages

In TLS 1.3 the client's handshake is over before the server has looked at its certificate
(RFC 8446, section 2), so a refusal arrives as an alert on the first read after it. trio-websocket
swallows whatever that read raises and then waits for an upgrade that cannot come. So it reads
through a stream that remembers the first failure, and that ends the wait for the upgrade: every
refusal is told at once, in words, and none of that library's exceptions leaves this module.

What a server that answers in plain HTTP says (a refusal for this role, say) is taken from its
body: `{"error": {"code", "message", "remedy"}}`.
"""

import os
import socket
import ssl
from contextlib import suppress

import trio
import trio_websocket
from attrs import define, field

from jobworker.client.address import Address
from jobworker.convert import loads
from jobworker.errors import (
    CertificateRefused,
    ConnectionFailed,
    HostUnknown,
    JobworkerError,
    MalformedJSON,
    error_from_wire,
)
from jobworker.pki.refusals import client_refusal
from jobworker.protocol.methods import SUBPROTOCOL

RECEIVE_BYTES = 262_144
MAX_MESSAGE_BYTES = 16 << 20
MESSAGE_QUEUE = 4
CLOSE_SECONDS = 1.0
POLICY_VIOLATION = 1008
"""RFC 6455, section 7.4.1: how a server ends the connection of a certificate it takes no more."""
_EXCERPT_CHARACTERS = 200


class _Observed(trio.abc.Stream):
    """A stream that remembers how it ended, and then gives up the wait for the upgrade."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self._inner = inner
        self.failure: BaseException | None = None
        self.upgrade = trio.CancelScope()

    def _end(self, failure: BaseException | None = None) -> None:
        self.failure = self.failure or failure
        self.upgrade.cancel()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio.abc.ReceiveStream."""
        try:
            data = bytes(await self._inner.receive_some(max_bytes))
        except trio.BrokenResourceError as broken:
            self._end(broken.__cause__)
            raise
        if not data:
            self._end()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See trio.abc.SendStream."""
        try:
            await self._inner.send_all(data)
        except trio.BrokenResourceError as broken:
            self._end(broken.__cause__)
            raise

    async def wait_send_all_might_not_block(self) -> None:
        """See trio.abc.SendStream."""
        await self._inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """See trio.abc.AsyncResource."""
        self._end()
        await self._inner.aclose()


@define(eq=False)
class Connection:
    """An open connection: whole messages, both ways, in order."""

    _socket: trio_websocket.WebSocketConnection
    _stream: _Observed
    _address: Address
    _fault: Exception | None = field(default=None, init=False)

    async def send(self, message: str) -> None:
        """Send a message. Raises as `receive` does; if cancelled, the connection is broken."""
        try:
            await self._socket.send_message(message)
        except trio_websocket.ConnectionClosed as closed:
            raise self._lost(closed.reason) from None

    async def receive(self) -> str | bytes:
        """Wait for the next message.

        Raises, once there is none to come, ConnectionFailed, or CertificateRefused where the server
        ended the connection for our certificate's sake.
        """
        try:
            return await self._socket.get_message()
        except trio_websocket.ConnectionClosed as closed:
            raise self._lost(closed.reason) from None

    async def aclose(self) -> None:
        """Say goodbye, for at most a second, and close."""
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            await self._socket.aclose()

    def _lost(self, reason: trio_websocket.CloseReason | None) -> JobworkerError:
        if reason is not None and reason.code == POLICY_VIOLATION:
            return CertificateRefused(
                f"cannot go on: the server ended this connection: {reason.reason}",
                remedy="ask the administrator for a new certificate; jobs go on without it",
            )
        if self._fault is not None:
            why = f"the server does not keep to the protocol ({self._fault!r})"
        elif reason is None or reason.code == 1006:  # RFC 6455, 7.4.1: no closing frame came
            why = _system_reason(self._stream.failure) or "the server closed it"
        else:
            why = f"the server closed it ({reason.code} {reason.reason or reason.name})"
        return ConnectionFailed(
            f"cannot go on: the connection to {self._address} broke: {why}",
            remedy="jobs go on without it; connect again",
        )


async def serve_connection(
    address: Address,
    tls: ssl.SSLContext,
    *,
    task_status: trio.TaskStatus[Connection] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Connect, report the Connection as started, and serve it to its end.

    Before it has started, raises HostUnknown, ConnectionFailed, ServerUntrusted,
    CertificateRefused or what the server answered; the caller bounds the time. Afterwards it
    raises nothing: whoever sends or receives is told.
    """
    stream = await _reach(address)
    connection: Connection | None = None
    fault: Exception | None = None
    try:
        observed = _Observed(await _shake_hands(stream, address, tls))
        try:
            async with trio.open_nursery() as nursery:
                with observed.upgrade:
                    websocket = await trio_websocket.wrap_client_stream(
                        nursery,
                        observed,  # type: ignore[arg-type] # any stream will do
                        str(address),
                        "/",
                        subprotocols=[SUBPROTOCOL],
                        message_queue_size=MESSAGE_QUEUE,
                        max_message_size=MAX_MESSAGE_BYTES,
                        receive_buffer_size=RECEIVE_BYTES,
                    )
                    if websocket.subprotocol == SUBPROTOCOL:
                        connection = Connection(websocket, observed, address)
                if connection is None:
                    nursery.cancel_scope.cancel()
                else:
                    task_status.started(connection)
        except* Exception as group:  # noqa: BLE001 - one connection's boundary
            fault = _first(group)
        if connection is None:
            raise _refusal(address, observed.failure, fault)
        connection._fault = fault
    finally:
        await trio.aclose_forcefully(stream)


async def _reach(address: Address) -> trio.SocketStream:
    try:
        stream = await trio.open_tcp_stream(address.host, address.port)
    except (socket.gaierror, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no host name"
        raise HostUnknown(
            f"cannot connect to {address}: cannot resolve {address.host!r}: {why}",
            remedy="check the name in --server or WORKER_SERVER",
        ) from None
    except OSError as error:
        # For several addresses trio gives a group of what each attempt met.
        why = _system_reason(error.__cause__) or _system_reason(error) or str(error)
        raise ConnectionFailed(
            f"cannot connect to {address}: {why}",
            remedy="is `worker serve` running there? check --server or WORKER_SERVER",
        ) from None
    _keep_alive(stream)
    return stream


def _keep_alive(stream: trio.SocketStream) -> None:
    """Have the kernel find out that the server's machine is gone: tcp(7)."""
    with suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):  # not on every system
                stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _shake_hands(
    tcp: trio.SocketStream, address: Address, tls: ssl.SSLContext
) -> "trio.SSLStream[trio.SocketStream]":
    stream = trio.SSLStream(tcp, tls, server_hostname=address.server_name, https_compatible=True)
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as broken:
        # Our alert stands in the outgoing BIO, which SSLStream flushes only on success; the server
        # is to know why we go.
        with suppress(trio.BrokenResourceError), trio.move_on_after(CLOSE_SECONDS):
            await tcp.send_all(stream._outgoing.read())
        raise _refusal(address, broken.__cause__, None) from None
    return stream


def _refusal(
    address: Address, failure: BaseException | None, fault: Exception | None
) -> JobworkerError:
    """Why there is no connection: how the stream failed, or what the upgrade met."""
    if isinstance(fault, trio_websocket.ConnectionRejected):
        return _rejection(address, fault)
    if isinstance(failure, ssl.SSLError):
        return client_refusal(failure)
    if fault is None and failure is not None:
        why = _system_reason(failure) or "the connection broke"
        return ConnectionFailed(
            f"cannot connect to {address}: the server broke off ({why})",
            remedy="its log may say why; check --cert and --key as well",
        )
    return ConnectionFailed(
        f"cannot connect to {address}: the server closed the connection, "
        f"or does not speak {SUBPROTOCOL}",
        remedy="check that --server names a jobworker service, and its log",
    )


def _rejection(address: Address, rejected: trio_websocket.ConnectionRejected) -> JobworkerError:
    text = (rejected.body or b"").decode("utf-8", "replace")
    with suppress(MalformedJSON):
        body = loads(text)
        told = body.get("error") if isinstance(body, dict) else None
        if isinstance(told, dict):
            code, message, remedy = told.get("code"), told.get("message"), told.get("remedy", "")
            if type(code) is int and isinstance(message, str) and isinstance(remedy, str):
                return error_from_wire(code, message, {"remedy": remedy})
    excerpt = " ".join(text.split())[:_EXCERPT_CHARACTERS]
    return ConnectionFailed(
        f"cannot connect to {address}: the server answered HTTP {rejected.status_code}"
        + (f": {excerpt}" if excerpt else ""),
        remedy="check that --server names a jobworker service",
    )


def _system_reason(error: BaseException | None) -> str:
    """What the system says of a failure, such as "Connection refused"; "" where it is silent."""
    if isinstance(error, BaseExceptionGroup):
        reasons = [_system_reason(inner) for inner in error.exceptions]
        return ", ".join(dict.fromkeys(reason for reason in reasons if reason))
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return ""


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
