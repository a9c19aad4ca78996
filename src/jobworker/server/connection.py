"""One client's connection, from the TLS handshake to its end; here alone stands trio-websocket.

    handshake ─► who is it? ─► HTTP head ─► WebSocket ─► ┌ reader: a task for each call
                                                         └ subscriptions: a task for each

trio-websocket has faults that a hostile client can reach (an uncaught exception in one
connection ends the whole server; a request that is no upgrade holds its task). So nothing of it
runs before the head has been read and checked here, under a deadline, and `serve_connection` is
one of the two places that catch everything: a fault ends its own connection and no other.

A refusal is always sent: a TLS alert by hand, since trio.SSLStream drops it when the handshake
fails; after the handshake an HTTP reply that says why.
"""

import logging
import secrets
import socket
import ssl
from contextlib import suppress
from functools import partial

import h11
import trio
import trio_websocket
from attrs import define, field

from jobworker.errors import CertificateRefused, InternalError, JobworkerError
from jobworker.pki.identity import Identity
from jobworker.pki.refusals import explain_server_side
from jobworker.protocol.methods import SUBPROTOCOL
from jobworker.protocol.session import MAX_IN_FLIGHT, Call, Refusal, ServerSession
from jobworker.server import operations
from jobworker.server.auditor import Auditor
from jobworker.server.door import Door, Visitor
from jobworker.server.framed_socket import FramedSocket
from jobworker.server.gate import Caller
from jobworker.server.http_head import (
    CLOSE_SECONDS,
    PrefixStream,
    Refused,
    TLSStream,
    admit,
    read_head,
    reply,
)
from jobworker.server.subscriptions import Subscriptions

log = logging.getLogger("jobworker.server")

HANDSHAKE_SECONDS = 10.0
MAX_MESSAGE_BYTES = 4 << 20
"""Room for a request of 1 MiB of arguments, however they are escaped in JSON."""
RECEIVE_BYTES = 65_536
DISMISSAL_SECONDS = 0.3
"""What a client that has to leave gets to take what is on its way, and then the reason."""
POLICY_VIOLATION = 1008


async def serve_connection(tcp: trio.SocketStream, door: Door, context: operations.Context) -> None:
    """Serve one client to its end; raises nothing but cancellation."""
    tls = door.fittings.tls
    stream = trio.SSLStream(tcp, tls, server_side=True, https_compatible=True)
    peer = _peer_name(tcp)
    try:
        _keep_alive(tcp)
        with trio.fail_after(HANDSHAKE_SECONDS):
            if not await _shake_hands(stream, tcp, peer, context.auditor):
                return
            raw, head = await read_head(stream)
            try:
                who = admit(stream, head, context.gate.roles)
            except Refused as refused:
                log.info("%s: refused: %s", peer, refused.error)
                context.auditor.refused(peer, refused.error.message)
                await reply(stream, head.connection, refused)
                return
        certificate = stream.getpeercert(binary_form=True)
        assert certificate is not None
        with door.visit(who, certificate, peer, tls) as visitor:
            await _serve_websocket(PrefixStream(stream, raw), visitor, context)
    except* CertificateRefused as group:
        log.info("%s: refused: %s", peer, group.exceptions[0])
        context.auditor.refused(peer, str(group.exceptions[0]))
    except* (
        trio.TooSlowError,
        trio.BrokenResourceError,
        trio.ClosedResourceError,
        trio_websocket.ConnectionClosed,
        h11.ProtocolError,
    ) as group:
        log.debug("%s: ended: %r", peer, group.exceptions)
    except* Exception:
        log.exception("incident %s: connection of %s", secrets.token_hex(4), peer)
    finally:
        await trio.aclose_forcefully(stream)


def _peer_name(tcp: trio.SocketStream) -> str:
    with suppress(OSError):
        host, port = tcp.socket.getpeername()[:2]
        return f"{host}:{port}"
    return "a client that is gone"


def _keep_alive(tcp: trio.SocketStream) -> None:
    """Have the kernel find out that a client's machine is gone: tcp(7)."""
    with suppress(OSError):
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


async def _shake_hands(
    stream: TLSStream, tcp: trio.SocketStream, peer: str, auditor: Auditor
) -> bool:
    """The TLS handshake; a refused client is told why, and False returned."""
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as broken:
        cause = broken.__cause__
        if not isinstance(cause, ssl.SSLError):
            log.info("%s: TLS refused: the client went away", peer)
            return False
        why = explain_server_side(cause)
        log.info("%s: TLS refused: %s", peer, why)
        auditor.refused(peer, why)
        # The alert stands in the outgoing BIO, which SSLStream flushes only on success. Then the
        # client's own words are read to their end: closing on unread data would send a reset,
        # which overtakes the alert.
        alert = stream._outgoing.read()
        with suppress(trio.BrokenResourceError), trio.move_on_after(CLOSE_SECONDS):
            await tcp.send_all(alert)
            await tcp.send_eof()
            while await tcp.receive_some(RECEIVE_BYTES):
                pass
        return False
    return True


async def _serve_websocket(
    stream: PrefixStream, visitor: Visitor, context: operations.Context
) -> None:
    who, peer = visitor.identity, visitor.peer

    async def leave_when_closed() -> None:
        await stream.closed.wait()
        await trio.sleep(CLOSE_SECONDS)  # what came before may still be answered
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave_when_closed)
        nursery.start_soon(visitor.leave_at_expiry)
        with trio.fail_after(HANDSHAKE_SECONDS):
            request = await trio_websocket.wrap_server_stream(
                nursery,
                stream,
                message_queue_size=4,
                max_message_size=MAX_MESSAGE_BYTES,
                receive_buffer_size=RECEIVE_BYTES,
            )
            socket_ = FramedSocket(await request.accept(subprotocol=SUBPROTOCOL), stream)
        log.info("%s: connected: %s (%s)", peer, who.common_name, who.role)
        connection = _Connection(socket_, who, context, peer)
        nursery.start_soon(connection.end_with, visitor)
        try:
            await connection.serve()
        finally:
            if visitor.reason:
                context.auditor.dismissed(peer, visitor.reason, who)
            await _say_goodbye(socket_, visitor.reason)
            log.info("%s: disconnected", peer)
            nursery.cancel_scope.cancel()


async def _say_goodbye(socket_: FramedSocket, reason: str) -> None:
    """Close, and tell a client that has to go why (RFC 6455, 7.4.1: 1008 is a policy's doing)."""
    seconds = DISMISSAL_SECONDS if reason else CLOSE_SECONDS
    with trio.move_on_after(seconds, shield=True):
        if reason:
            await socket_.aclose(POLICY_VIOLATION, reason.encode()[:120].decode(errors="ignore"))
        else:
            await socket_.aclose()


@define(eq=False)
class _Connection:
    """A client that has been let in."""

    _socket: FramedSocket
    _who: Identity
    _context: operations.Context
    _peer: str
    _session: ServerSession = field(factory=ServerSession)
    _subscriptions: Subscriptions = field(init=False)
    _scope: trio.CancelScope = field(factory=trio.CancelScope)
    _answering: int = 0
    _answered: trio.Event = field(factory=trio.Event)
    _leaving: bool = False
    _sending: int = 0
    _quiet: trio.Event = field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        show = partial(self._context.gate.shown, self._who)
        self._subscriptions = Subscriptions(
            self._context.supervisor, self._send, show, self._context.stall_seconds
        )

    async def serve(self) -> None:
        """Answer calls until the client goes."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    while True:
                        message = await self._socket.get_message()
                        received = self._session.receive(message)
                        if isinstance(received, Refusal):
                            if received.message is not None:
                                await self._send(received.message)
                            continue
                        while self._answering >= MAX_IN_FLIGHT:  # notifications, say
                            self._answered = trio.Event()
                            await self._answered.wait()
                        self._answering += 1
                        nursery.start_soon(self._serve_call, received)
        finally:
            self._subscriptions.close()

    async def end_with(self, visitor: Visitor) -> None:
        """End the connection when its client has to leave.

        What is being sent gets a moment: a message that is cut off breaks the stream, and then the
        reason could not be told.
        """
        await visitor.leaving.wait()
        self._leaving, self._quiet = True, trio.Event()
        if self._sending:
            with trio.move_on_after(DISMISSAL_SECONDS):
                await self._quiet.wait()
        self._scope.cancel()

    async def _serve_call(self, call: Call) -> None:
        try:
            subscription = await self._answer(call)
        finally:
            self._answering -= 1
            self._answered.set()
        if subscription is not None:
            await self._subscriptions.run(subscription)

    async def _answer(self, call: Call) -> int | None:
        """Call and reply: the number of the subscription that was opened, if any."""
        caller = Caller(
            identity=self._who,
            subscriptions=self._subscriptions,
            gate=self._context.gate,
            peer=self._peer,
        )
        try:
            result = await operations.call(self._context, caller, call.method, call.params)
        except JobworkerError as error:
            if call.answered:
                await self._send(self._session.error(call.id, error))
            return None
        except Exception:
            incident = secrets.token_hex(4)
            log.exception("incident %s: %s", incident, call.method.name)
            if call.answered:
                fault = InternalError(
                    f"cannot serve {call.method.name}: an internal fault (incident {incident})",
                    remedy="give the incident's number to who runs the service",
                )
                await self._send(self._session.error(call.id, fault))
            return None
        if call.answered:
            await self._send(self._session.result(call.id, result))
        subscription = getattr(result, "subscription", None)
        return subscription if isinstance(subscription, int) else None

    async def _send(self, message: str | bytes) -> None:
        """Send one message; a client that takes nothing is let go."""
        if self._leaving:
            await trio.sleep_forever()  # until the connection has ended
        self._sending += 1
        with trio.move_on_after(self._context.stall_seconds) as patience:
            try:
                await self._socket.send_message(message)
            finally:
                self._sending -= 1
                if not self._sending:
                    self._quiet.set()
        if patience.cancelled_caught:
            log.info("%s: let go: it takes nothing", self._who.common_name)
            self._scope.cancel()
