"""One connection to a server, from its name to its last message.

    name ─► TCP ─► TLS 1.3 ─► HTTP upgrade ─► messages

In TLS 1.3 the client's handshake is over before the server has checked its certificate (RFC 8446,
section 2), so a refusal arrives as an alert at the first read after it. Each refusal is raised as a
JobworkerError; no exception of TLS or WebSocket leaves this module.

A server may refuse the upgrade with a plain HTTP response, for example because of the client's
role. The error is then in its body: `{"error": {"code", "message", "remedy"}}`.
"""

import os
import socket
import ssl
from contextlib import suppress
from pathlib import Path

import trio
from attrs import define

from jobworker.client.address import Address
from jobworker.client.silence import Traffic
from jobworker.client.websocket import LOST, Closed, Rejected, Violation, WebSocket, upgrade
from jobworker.errors import (
    CertificateRefused,
    ConnectionFailed,
    HostUnknown,
    JobworkerError,
    MalformedJSON,
    MessageTooLarge,
    NoService,
    ProtocolError,
    error_from_wire,
)
from jobworker.pki.own_certificate import with_cause
from jobworker.pki.refusals import client_refusal
from jobworker.protocol.closing import ENDED, Verdict, verdict
from jobworker.protocol.methods import SUBPROTOCOL
from jobworker.serialization.json_text import loads
from jobworker.threads import in_thread
from jobworker.tls_stream import TLSStream

CLOSE_SECONDS = 1.0
RECEIVE_BYTES = 262_144
_EXCERPT_CHARACTERS = 200


@define(eq=False)
class Connection:
    """An open connection: whole messages in both directions, in order."""

    _socket: WebSocket
    _address: Address
    is_ended: bool = False
    """Whether the server has announced its end by a closing frame (`closing.ENDED`)."""

    async def send(self, message: str) -> None:
        """Send a message. Raises as `receive` does; a cancellation breaks the connection."""
        try:
            await self._socket.send(message)
        except Closed as closed:
            raise self._lost(closed) from None

    async def receive(self) -> str | bytes | memoryview:
        """Wait for the next message; a view is valid until the next call.

        At the end, raises the error that `closing` has for the server's closing frame:
        ConnectionFailed if the client may go on over a new connection, CertificateRefused,
        MessageTooLarge, or ProtocolError.
        """
        try:
            return await self._socket.receive()
        except (
            Closed,
            Violation,
            trio.BrokenResourceError,
            trio.ClosedResourceError,
        ) as failure:
            raise self._lost(failure) from None

    async def ping(self) -> None:
        """Send a ping. A broken connection is no error here: `receive` raises it."""
        with suppress(Closed):
            await self._socket.ping()

    @property
    def traffic(self) -> Traffic:
        """What has passed over this connection so far."""
        return self._socket.traffic

    def silent(self, seconds: float) -> ConnectionFailed:
        """Make the error for a server that has shown no sign of life for so long (`silence`)."""
        return ConnectionFailed(
            f"cannot go on: the service at {self._address} does not answer: nothing has arrived "
            f"for {seconds:.0f} s, not even the answer to a ping",
            remedy="is it stopped, or is the network down? jobs go on without it; connect again",
        )

    async def aclose(self) -> None:
        """Send a closing frame, wait at most a second for the server's, and close."""
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            await self._socket.aclose()

    def _lost(self, failure: Exception) -> JobworkerError:
        if isinstance(failure, Violation):
            return ProtocolError(
                f"cannot go on: the server violates the protocol ({failure})",
                remedy="do client and server have the same version?",
            )
        if isinstance(failure, Closed) and failure.code != LOST:
            self.is_ended = failure.code in ENDED
            why = f"the server closed it ({failure.code}{failure.reason and ' ' + failure.reason})"
            match verdict(failure.code):
                case Verdict.RENEW:
                    return CertificateRefused(
                        "cannot go on: the server ended this connection: "
                        + failure.reason.removeprefix(f"{CertificateRefused.name}: "),
                        remedy="ask the administrator for a new certificate; jobs go on without it",
                    )
                case Verdict.TOO_LARGE:
                    return MessageTooLarge(failure.reason or "it names no bound")
                case Verdict.FATAL:
                    return ProtocolError(f"cannot go on: {why}", remedy="its log may say why")
                case Verdict.AGAIN:
                    pass
        else:
            why = _system_reason(failure.__cause__) or "the server closed it"
        return ConnectionFailed(
            f"cannot go on: the connection to {self._address} broke: {why}",
            remedy="jobs go on without it; connect again",
        )


async def serve_connection(
    address: Address,
    tls: ssl.SSLContext,
    *,
    own: Path | None = None,
    task_status: trio.TaskStatus[Connection] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Connect, report the Connection as started, and keep it until it is closed.

    Before `started`, raises HostUnknown, ConnectionFailed, ServerUntrusted, CertificateRefused
    (with the cause found in `own`, the client's certificate file) or the server's error; the caller
    bounds the time. After `started`, it raises nothing: `send` and `receive` raise.
    """
    stream: trio.abc.AsyncResource = (tcp := await _reach(address))
    try:
        try:
            stream = secured = TLSStream(
                tcp, tls, server_name=address.server_name, receive_bytes=RECEIVE_BYTES
            )
            await secured.do_handshake()
            socket_ = await upgrade(secured, str(address), SUBPROTOCOL)
        except trio.BrokenResourceError as broken:
            refusal = _refusal(address, broken.__cause__)
            raise await in_thread(with_cause, refusal, own) if own else refusal from None
        except Closed:
            raise _refusal(address, None) from None
        except Violation as violation:
            raise _other_server(address, str(violation)) from None
        except Rejected as rejected:
            raise _rejection(address, rejected) from None
        task_status.started(Connection(socket_, address))
        await socket_.closed.wait()
    finally:
        await trio.aclose_forcefully(stream)


async def _reach(address: Address) -> trio.SocketStream:
    try:
        stream = await trio.open_tcp_stream(address.host, address.port)
    except (socket.gaierror, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not a host name"
        raise HostUnknown(
            f"cannot connect to {address}: cannot resolve {address.host!r}: {why}",
            remedy="check the name in the address (for worker-cli: --server or WORKER_SERVER)",
        ) from None
    except OSError as error:
        # If the name has several addresses, trio raises a group of each attempt's error.
        why = _system_reason(error.__cause__) or _system_reason(error) or str(error)
        raise ConnectionFailed(
            f"cannot connect to {address}: {why}",
            remedy="is `worker serve` running there? check the address (for worker-cli: --server "
            "or WORKER_SERVER)",
        ) from None
    _keep_alive(stream)
    return stream


def _keep_alive(stream: trio.SocketStream) -> None:
    """Enable TCP keep-alive, so that the kernel detects a lost server machine: tcp(7)."""
    with suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):  # not on every system
                stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _refusal(address: Address, failure: BaseException | None) -> JobworkerError:
    """Make the error for a failed start: `failure` of the stream, None if it was closed."""
    if isinstance(failure, ssl.SSLError):
        return client_refusal(failure)
    if failure is None:
        return _other_server(address, "it closed the connection", ConnectionFailed)
    why = _system_reason(failure) or "the connection broke"
    return ConnectionFailed(
        f"cannot connect to {address}: the server broke the connection ({why})",
        remedy="its log may say why; check the certificate and the key as well",
    )


def _other_server(
    address: Address, why: str, cls: type[ConnectionFailed] = NoService
) -> ConnectionFailed:
    return cls(
        f"cannot connect to {address}: the server closed the connection, "
        f"or does not speak {SUBPROTOCOL} ({why})",
        remedy="check that a jobworker service has this address, and read its log",
    )


def _rejection(address: Address, rejected: Rejected) -> JobworkerError:
    text = rejected.body.decode("utf-8", "replace")
    with suppress(MalformedJSON):
        body = loads(text)
        error = body.get("error") if isinstance(body, dict) else None
        if isinstance(error, dict):
            code, message, remedy = error.get("code"), error.get("message"), error.get("remedy", "")
            if type(code) is int and isinstance(message, str) and isinstance(remedy, str):
                return error_from_wire(code, message, {"remedy": remedy})
    excerpt = " ".join(text.split())[:_EXCERPT_CHARACTERS]
    return NoService(
        f"cannot connect to {address}: the server answered HTTP {rejected.status}"
        + (f": {excerpt}" if excerpt else ""),
        remedy="check that a jobworker service has this address",
    )


def _system_reason(error: BaseException | None) -> str:
    """The system's reason for a failure, such as "Connection refused"; "" if it has none."""
    if isinstance(error, BaseExceptionGroup):
        reasons = [_system_reason(inner) for inner in error.exceptions]
        return ", ".join(dict.fromkeys(reason for reason in reasons if reason))
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return ""
