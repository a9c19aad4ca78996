"""One client's connection, from the TLS handshake to its end.

    handshake ─► who is it? ─► HTTP head ─► WebSocket ─► `Conversation`

trio-websocket has faults that a hostile client can reach (an uncaught exception in one connection
ends the whole server; a request that is no upgrade holds its task). So this module first reads and
checks the HTTP head, under a deadline, before any code of trio-websocket runs. `serve_connection`
catches every exception: a fault ends its own connection and no other.

The server always sends a refusal. During the handshake it is an alert of OpenSSL's, and after it an
HTTP reply with the reason. A client that speaks HTTP without TLS gets such a reply too.
"""

import logging
import math
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import h11
import trio
import trio_websocket
import wsproto.utilities

from jobworker.errors import (
    CertificateRefused,
    JobworkerError,
    PermissionDenied,
    SendStalled,
    TooManyConnections,
    TooManyFailures,
)
from jobworker.pki.identity import Identity
from jobworker.pki.refusals import explain_server_side
from jobworker.protocol.methods import SUBPROTOCOL
from jobworker.server.access.auditor import Auditor
from jobworker.server.access.connected_clients import (
    ConnectedClient,
    ConnectedClients,
    PeerCertificates,
    TlsState,
)
from jobworker.server.connections.frame_scan import RECORD_COST
from jobworker.server.connections.framed_socket import FramedSocket
from jobworker.server.connections.http_head import (
    CLOSE_SECONDS,
    PrefixStream,
    UpgradeRefused,
    accept_upgrade,
    find_identity,
    http_connection,
    plain_reply,
    read_head,
    reply,
)
from jobworker.server.connections.local_user import local_user
from jobworker.server.fairness.connection_limiter import (
    ConnectionLimiter,
    PendingConnection,
    line_of,
    network_of,
)
from jobworker.server.fairness.slots import LARGE_BYTES
from jobworker.server.requests import operations
from jobworker.server.requests.conversation import Conversation
from jobworker.server.requests.read_backpressure import UNREAD
from jobworker.tls_records import RECORD_HEADER_BYTES, HandshakeBounds
from jobworker.tls_stream import RECORD_BYTES, TLSStream

log = logging.getLogger("jobworker.server")

MAX_FRAGMENTS = 16_384
"""The most frames of one message. Empty frames add nothing to its size, but each takes memory."""

HANDSHAKE_3_X = b"\x16\3"
ESTABLISHED = 1
"""TCP_ESTABLISHED of the kernel's net/tcp_states.h."""
HELLO_BYTES = 8192
"""The most that a client of TLS 1.3 may send before its certificate. OpenSSL's hello has 0.2 KB,
and 1.2 KB more with a key share of X25519MLKEM768. The longest turn for one of 8 KB took 2.5 ms,
that for an ordinary one 0.6 ms."""
HANDSHAKE_BYTES = 16_384
"""The most that a client may send in its handshake, certificates included. Four certificates with
RSA keys of 4,096 bits have 7 KB. OpenSSL takes 0.15 ms for a certificate, however short it is."""


def turn_away(accepted: socket.socket, limiter: ConnectionLimiter) -> bool:
    """Whether to close a connection that was just accepted: its peer is gone, or it has no place.

    The check is cheap, since such connections come in floods.
    """
    if _is_gone(accepted):
        return True
    if not limiter.slows_anybody():
        return False
    peer = _peer_name(accepted)
    refusal = limiter.refusal(_network(peer, accepted, limiter))
    if refusal is not None:
        limiter.record_limit(peer, refusal)
    return refusal is not None


async def serve_connection(
    tcp: trio.SocketStream, clients: ConnectedClients, context: operations.OperationContext
) -> None:
    """Serve one client to its end; raises nothing but cancellation."""
    peer, limiter = _peer_name(tcp.socket), context.limiter
    stream: TLSStream | None = None
    parted = False
    try:
        network, is_gone = _network(peer, tcp.socket, limiter), partial(_is_gone, tcp.socket)
        with limiter.track_pending(peer, network, is_gone) as pending, ExitStack() as inside:
            # Before this the service makes few objects: a flood's connections come no further.
            if not await _says_hello(tcp.socket):
                return  # a health check, for example
            await limiter.wait_turn(pending)
            await context.handshakes.wait_turn(line_of(network))
            pending.start_turn()
            _keep_alive(tcp)
            tls_state = clients.tls_state
            stream = TLSStream(
                tcp,
                tls_state.tls,
                server_side=True,
                bounds=_handshake_bounds(tls_state.tls),
                take_turn=partial(context.incoming.wait_turn, line_of(network), RECORD_COST),
            )
            http, head = http_connection(), None
            try:
                if not await _shake_hands(stream, peer, context.auditor):
                    return
                shown = _look_at_certificate(stream, pending, tls_state, context)
                await context.handshakes.wait_turn(_line_of(shown, network))
                pending.start_turn()
                raw, head = await read_head(stream, http)
                who = accept_upgrade(shown, head, tls_state)
                inside.enter_context(_entered(limiter, who, peer))
                certificates = PeerCertificates(stream.peer_certificate, stream.peer_chain)
                stream.stall_seconds = context.stall_seconds
                client = inside.enter_context(
                    clients.register(who, certificates, peer, tls_state.tls)
                )
                parted = await _serve_websocket(
                    PrefixStream(stream, raw, partial(context.incoming.wait_turn, who.common_name)),
                    client,
                    pending,
                    context,
                )
            except UpgradeRefused as refused:
                log.info("%s: refused: %s", peer, refused.error)
                context.auditor.refused(peer, refused.error.message)
                headless = head is not None and head.request.method == b"HEAD"
                await reply(stream, http, refused, without_body=headless)
            finally:
                if not parted:  # else the client has the last message, and the server closes first
                    with trio.move_on_after(CLOSE_SECONDS):
                        await stream.linger()  # else the last message might not arrive
    except* CertificateRefused as group:
        log.info("%s: refused: %s", peer, group.exceptions[0])
        context.auditor.refused(peer, str(group.exceptions[0]))
    except* (TooManyFailures, SendStalled) as group:
        limiter.record_limit(peer, _only(group))
    except* (
        trio.TooSlowError,
        trio.BrokenResourceError,
        trio.ClosedResourceError,
        trio_websocket.ConnectionClosed,
        h11.ProtocolError,
        wsproto.utilities.ProtocolError,  # the client sent a frame after the server's closing frame
    ) as group:
        log.debug("%s: ended: %r", peer, group.exceptions)
    except* Exception:  # noqa: BLE001 - recorded
        context.incidents.record("connection", f"connection of {peer}")
    finally:
        await trio.aclose_forcefully(stream or tcp)


@contextmanager
def _entered(limiter: ConnectionLimiter, who: Identity, peer: str) -> Iterator[None]:
    """Count the connection as open while the block lasts; raises Refused if there is no place."""
    with ExitStack() as place:
        try:
            place.enter_context(limiter.track_open(who.common_name))
        except TooManyConnections as full:
            limiter.record_limit(peer, full)
            raise UpgradeRefused(503, full) from None
        yield


def _only(group: BaseExceptionGroup[JobworkerError]) -> JobworkerError:
    inner = group.exceptions[0]
    return _only(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _network(
    peer: str, tcp: socket.socket | trio.socket.SocketType, limiter: ConnectionLimiter
) -> str:
    return network_of(peer.rpartition(":")[0], local_user(tcp, limiter.job_ids))


def _peer_name(tcp: socket.socket | trio.socket.SocketType) -> str:
    with suppress(OSError):
        host, port = tcp.getpeername()[:2]
        host = host.removeprefix("::ffff:")  # an IPv4 client of a listener at "::"
        return f"{host}:{port}"
    return "a client that is gone"


def _keep_alive(tcp: trio.SocketStream) -> None:
    """Turn on TCP keepalive: the kernel then detects that a client's machine is gone: tcp(7)."""
    with suppress(OSError):
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


async def _says_hello(tcp: trio.socket.SocketType) -> bool:
    """Wait for a client's first TLS record, and leave it in the socket; False if the client closes.

    So a client that sends less than a record takes no turn from the handshakes. OpenSSL refuses
    bytes that are no record of a handshake (RFC 8446, section 5.1).
    """
    with suppress(OSError):
        # This mostly returns the whole record.
        said = await tcp.recv(RECORD_HEADER_BYTES + RECORD_BYTES, socket.MSG_PEEK)
        for _ in ("header", "content"):
            if len(said) < (size := _record_size(said)):
                said = await _peek(tcp, size)
        return not _is_gone(tcp)
    return False


def _record_size(said: bytes) -> int:
    """The size in bytes of the TLS record that begins so.

    It is 0 if these bytes begin no record of a handshake, or one that is too long.
    """
    if len(said) < RECORD_HEADER_BYTES:
        return RECORD_HEADER_BYTES
    length = int.from_bytes(said[3:RECORD_HEADER_BYTES])
    sound = said[:2] == HANDSHAKE_3_X and length <= RECORD_BYTES
    return RECORD_HEADER_BYTES + length if sound else 0


async def _peek(tcp: trio.socket.SocketType, size: int) -> bytes:
    """Wait until `size` bytes can be read, and return them without taking them.

    Returns fewer at the stream's end, or if the kernel is short of memory.
    """
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
    try:
        await trio.lowlevel.wait_readable(tcp)
    finally:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    return await tcp.recv(size, socket.MSG_PEEK)


def _is_gone(tcp: socket.socket | trio.socket.SocketType) -> bool:
    """Whether the peer has closed: tcpi_state of tcp_info, tcp(7)."""
    return tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != ESTABLISHED


def _handshake_bounds(tls: ssl.SSLContext) -> HandshakeBounds:
    """In TLS 1.2, certificates are not encrypted either, so nothing bounds the hello apart."""
    only_1_3 = tls.minimum_version is ssl.TLSVersion.TLSv1_3
    return HandshakeBounds(HELLO_BYTES if only_1_3 else math.inf, HANDSHAKE_BYTES)


async def _shake_hands(stream: TLSStream, peer: str, auditor: Auditor) -> bool:
    """Do the TLS handshake. If it fails, log the reason and return False.

    The client gets OpenSSL's alert, or an HTTP reply if it spoke HTTP without TLS.
    """
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as broken:
        cause = broken.__cause__
        if not isinstance(cause, ssl.SSLError):
            log.info("%s: TLS refused: the client went away", peer)
            return False
        if cause.reason == "HTTP_REQUEST":  # openssl/sslerr.h: an HTTP client understands no alert
            with suppress(OSError):  # the reply fits into the socket's empty buffer
                stream.socket.send(plain_reply())
        why = explain_server_side(cause)
        log.info("%s: TLS refused: %s", peer, why)
        auditor.refused(peer, why)
        return False
    return True


def _look_at_certificate(
    stream: TLSStream,
    pending: PendingConnection,
    tls_state: TlsState,
    context: operations.OperationContext,
) -> Identity | PermissionDenied:
    """The client's identity, or the error if its certificate has none; count the client as active.

    A connection does not count as active before this. Otherwise strangers could slow down each
    client that works alone, with a few bytes a second.
    """
    pending.mark_authenticated()
    shown = find_identity(stream, context.authorization.roles, tls_state)
    if isinstance(shown, Identity):
        context.active_clients.came(shown.common_name, line_of(pending.network))
    return shown


def _line_of(shown: Identity | PermissionDenied, network: str) -> str:
    """The line for the rest of a handshake: the client's own, so that it waits for no other name.

    Without an identity it is the line of its network.
    """
    return shown.common_name if isinstance(shown, Identity) else line_of(network)


async def _serve_websocket(
    stream: PrefixStream,
    client: ConnectedClient,
    pending: PendingConnection,
    context: operations.OperationContext,
) -> bool:
    """Serve a connection to its end. Returns whether the client answered the closing frame.

    After the answer neither side sends anything more, and the server closes the TCP connection
    first: RFC 6455, section 7.1.1.
    """
    parted = False
    who, peer = client.identity, client.peer

    async def leave_when_closed() -> None:
        await stream.closed.wait()
        await trio.sleep(CLOSE_SECONDS)  # calls from before the close may still be answered
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave_when_closed)
            nursery.start_soon(client.leave_at_expiry)
            request = await trio_websocket.wrap_server_stream(
                nursery,
                stream,
                message_queue_size=0,  # backpressure: messages wait at the client, not here
                max_message_size=context.limiter.limits.max_message_bytes,
                receive_buffer_size=RECORD_BYTES,
            )
            socket_ = await request.accept(subprotocol=SUBPROTOCOL)
            pending.finish()
            log.info("%s: connected: %s (%s)", peer, who.common_name, who.role)
            framed = FramedSocket(socket_, stream)
            stream.say_why = framed.say_why
            conversation = Conversation(framed, client, context)
            stream.check = partial(_check_parts, socket_, conversation)
            nursery.start_soon(conversation.end_when_dismissed)
            try:
                await conversation.serve()
            finally:
                if client.reason:
                    context.auditor.dismissed(peer, client.reason, who)
                parted = await conversation.say_goodbye()
                log.info("%s: disconnected", peer)
                nursery.cancel_scope.cancel()
    finally:
        stream.part()
    return parted


async def _check_parts(
    socket_: trio_websocket.WebSocketConnection, conversation: Conversation
) -> float:
    """Wait until more of the current message may be read. Returns the seconds until the next check.

    If the client may send no large message, its bytes are dropped as they come, so the message
    needs no slot. `UNREAD` stands in its place and is refused once the message has ended. Raises
    BrokenResourceError if the message has more than `MAX_FRAGMENTS` frames.
    """
    parts, size = socket_._message_parts, socket_._message_size
    if len(parts) > MAX_FRAGMENTS:
        raise trio.BrokenResourceError(f"a message has more than {MAX_FRAGMENTS} frames")
    if size > LARGE_BYTES and conversation.refuses_large():
        parts[:] = [UNREAD if isinstance(parts[0], str) else UNREAD.encode()]
        size = 0
    return await conversation.wait_for_room(size)
