"""TLS over TCP, client or server side: one reader, any number of writers, fast for large output.

OpenSSL works on two buffers in memory, never on the socket. On the socket, it would block the event
loop for as long as a peer sends post-handshake messages (RFC 8446, section 4.6), and a half-sent
record would block everything else. OpenSSL gets one record at a time, and a server bounds the bytes
of a handshake (`tls_records`).

trio.SSLStream has such buffers too, but it reads one record (16 KiB) at a time and encrypts a whole
message at once. Here, a message is encrypted and sent a few records at a time, so the copied data
stays in the processor's cache. A read continues while data is available, so a large message costs
few turns of the event loop.

If the send of a message is cut off, the stream is broken for every later send. An end of the stream
without a TLS close_notify reads like one with it: WebSocket has a close message of its own. In TLS
1.3 the server checks the client's certificate after the client has finished its handshake (RFC
8446, section 2), so the client gets the server's alert at its next read. Any other failure is
raised as trio.BrokenResourceError, whose cause is the ssl.SSLError or OSError.
"""

import math
import socket
import ssl
import struct
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TypeVar

import trio

from jobworker.tls_records import HandshakeBounds, IncomingRecords

T = TypeVar("T")
Data = bytes | bytearray | memoryview

RECORD_BYTES = 16_384
"""Maximum of plain text in one TLS record: RFC 8446, section 5.1."""
BATCH_BYTES = 4 * RECORD_BYTES
MAX_LINGER_BYTES = 16 << 20
LEAST_TAKEN_BYTES = 4096
"""A peer that acknowledges fewer bytes in `stall_seconds` counts as one that reads nothing."""
_DER = 2
"""ENCODING_DER of CPython's module _ssl."""
_BYTES_ACKED = struct.Struct("=120xQ")
"""The field tcpi_bytes_acked of struct tcp_info, linux/tcp.h."""


class HandshakeTooLong(ssl.SSLError):
    """The peer has exceeded one of the `HandshakeBounds`."""

    reason = ""  # none of OpenSSL's: the text of the error says it


async def _at_once() -> None:
    pass


class TLSStream(trio.abc.Stream):
    """One side of a TLS connection over the socket of `tcp`, whose ownership it takes."""

    def __init__(
        self,
        tcp: trio.SocketStream,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_name: str | None = None,
        receive_bytes: int = RECORD_BYTES,
        bounds: HandshakeBounds = HandshakeBounds(),  # noqa: B008 - immutable
        take_turn: Callable[[], Awaitable[None]] = _at_once,
    ) -> None:
        """`receive_bytes` is the most that one recv(2) reads from the socket.

        A peer that exceeds one of the `bounds` is refused before OpenSSL gets the record.
        """
        incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            incoming, self._outgoing, server_side=server_side, server_hostname=server_name
        )
        """The TLS object: it answers questions about the peer's certificate."""
        taken = tcp.socket
        self.socket = socket.socket(taken.family, taken.type, taken.proto, fileno=taken.detach())
        """The TCP socket below; this stream owns it."""
        self.socket.setblocking(False)
        self.stall_seconds = math.inf
        """How long a peer may read nothing while something is being sent to it."""
        self.received_bytes = self.sent_bytes = 0
        """Bytes that the socket has given and taken so far."""
        self.take_turn = take_turn
        """Waits until this connection may decrypt or drop a record, or the part that has come."""
        self._receive_bytes = receive_bytes
        self._incoming = IncomingRecords(incoming, bounds)
        self._unsent = memoryview(b"")
        self._sending = trio.StrictFIFOLock()
        self._broken = self._finished = False

    async def do_handshake(self) -> None:
        """Do the handshake. A refused peer gets an alert, as far as it can be sent at once."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                if not self._incoming.give():
                    await self._flush()
                    await self._receive_more()
                    await trio.lowlevel.checkpoint()
                await self.take_turn()
            except ssl.SSLError as error:
                with suppress(BlockingIOError, trio.BrokenResourceError):
                    self._flush_now()
                excess = self._incoming.excess
                too_long = HandshakeTooLong(ssl.SSL_ERROR_SSL, excess)
                raise trio.BrokenResourceError from too_long if excess else error
            else:
                self._incoming.end_handshake()
                await self._flush()
                return

    @property
    def peer_certificate(self) -> Mapping[str, object]:
        """The peer's certificate, in the form of `ssl.SSLObject.getpeercert`; {} for none."""
        return self.tls.getpeercert() or {}

    @property
    def peer_chain(self) -> tuple[bytes, ...]:
        """The certificates in DER that the peer has presented and its check needed, its own first.

        A session of TLS 1.2 that was resumed has no check of its own, and all that were presented.
        Python 3.13 has public methods for it; in 3.10 to 3.12, only the inner object has them.
        """
        if sys.version_info >= (3, 13):
            presented, verified = self.tls.get_unverified_chain(), self.tls.get_verified_chain()
        else:
            inner = self.tls._sslobj  # type: ignore[attr-defined]
            chains = inner.get_unverified_chain(), inner.get_verified_chain()
            presented, verified = ([c.public_bytes(_DER) for c in chain or ()] for chain in chains)
        return tuple(each for each in verified or presented if each in presented)

    # --- reading ----------------------------------------------------------------------------

    async def receive_into(self, buffer: memoryview) -> int:
        """Wait for data and read it into `buffer`. Returns the number of bytes; 0 at the end."""
        return await self._receive(lambda: self._read_into(buffer))

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio.abc.ReceiveStream; returns the content of one record at the most."""
        size = min(max_bytes or RECORD_BYTES, RECORD_BYTES)
        return await self._receive(lambda: self._read_some(size))

    async def _receive(self, read: Callable[[], T | None]) -> T:
        """Call `read` until it returns a result; it returns None while there is no data."""
        await trio.lowlevel.checkpoint_if_cancelled()
        yielded = fruitless = False
        while True:
            self._check_open()
            if self._outgoing.pending:  # the answer to a key update
                await self._flush()
            found = read()
            if found is not None:
                if not yielded:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                return found
            if fruitless:  # post-handshake messages: a peer may send any number of them
                await trio.lowlevel.checkpoint()
            fruitless = True
            if not self._incoming.give():
                yielded = await self._receive_more() or yielded
            await self.take_turn()

    def _read_some(self, size: int) -> bytes | None:
        try:
            return self.tls.read(size)
        except ssl.SSLWantReadError:
            return None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""
        except ssl.SSLError as error:
            raise trio.BrokenResourceError from error

    def _read_into(self, buffer: memoryview) -> int | None:
        """Decrypt available data. Returns its size; None if there is none, 0 at the end."""
        filled = at_last_receive = 0
        try:
            while filled < len(buffer):
                try:
                    count = int(self.tls.read(len(buffer) - filled, buffer[filled:]))  # type: ignore[call-overload, unused-ignore]
                except ssl.SSLWantReadError:
                    if self._incoming.give():
                        continue
                    if filled == at_last_receive or not self._receive_now():
                        return filled or None
                    at_last_receive = filled
                    continue
                if not count:
                    break
                filled += count
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return filled
        except ssl.SSLError as error:
            if not filled:  # otherwise the next read raises it again
                raise trio.BrokenResourceError from error
        return filled

    async def _receive_more(self) -> bool:
        """Wait until the socket has data. Returns whether the task had to yield for it."""
        yielded = False
        while not self._receive_now():
            await trio.lowlevel.wait_readable(self.socket)
            yielded = True
        return yielded

    def _receive_now(self) -> bool:
        self._check_open()
        try:
            data = self.socket.recv(self._receive_bytes)
        except BlockingIOError:
            return False
        except OSError as error:
            raise trio.BrokenResourceError from error
        if data:
            self.received_bytes += len(data)
            self._incoming.receive(data)
        else:
            self._incoming.end()
        return True

    # --- sending ----------------------------------------------------------------------------

    async def send_all(self, data: Data, *more: Data) -> None:
        """Send `data` and `more`. Several tasks may send; the data of one call stays together.

        A cancellation half way breaks the stream. Raises trio.TooSlowError if the peer reads
        nothing for `stall_seconds` (at most twice that), not if it is only slow.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._sending.acquire_nowait()  # saves one turn of the event loop for each call
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            self._check_open()
            if self._broken:
                raise trio.BrokenResourceError("an earlier message was cut off")
            self._broken, yielded = True, False
            for part in (data, *more):
                rest = memoryview(part)
                while rest:
                    rest = rest[self._encrypt_record(rest) :]
                    if self._outgoing.pending >= BATCH_BYTES:
                        yielded = await self._send_outgoing() or yielded
            yielded = await self._send_outgoing() or yielded
            self._broken = False
        finally:
            self._sending.release()
        if not yielded:
            await trio.lowlevel.cancel_shielded_checkpoint()

    def _encrypt_record(self, data: memoryview) -> int:
        try:
            return self.tls.write(data)
        except ssl.SSLError as error:
            raise trio.BrokenResourceError from error

    async def _flush(self) -> None:
        async with self._sending:
            await self._send_outgoing()

    async def _send_outgoing(self) -> bool:
        """Send all encrypted data. Returns whether the task had to yield for it."""
        yielded = False
        while True:
            try:
                self._flush_now()
            except BlockingIOError:
                await self._wait_for_room()
                yielded = True
            else:
                return yielded

    def _flush_now(self) -> None:
        """Send encrypted data without blocking. Raises BlockingIOError if the socket is full."""
        self._check_open()
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
            try:
                sent = self.socket.send(self._unsent)
            except BlockingIOError:
                raise
            except OSError as error:
                raise trio.BrokenResourceError from error
            self.sent_bytes += sent
            # An empty view would keep the whole buffer alive until the next send.
            self._unsent = self._unsent[sent:] if sent < len(self._unsent) else memoryview(b"")

    async def _wait_for_room(self) -> None:
        taken = -LEAST_TAKEN_BYTES
        while True:
            if self.stall_seconds < math.inf:
                before, taken = taken, self.taken_bytes
                if taken < before + LEAST_TAKEN_BYTES:
                    raise trio.TooSlowError
            with trio.move_on_after(self.stall_seconds):
                await trio.lowlevel.wait_writable(self.socket)
                return

    @property
    def is_sending(self) -> bool:
        """Whether a task is sending, so that another one would have to wait."""
        return self._sending.locked()

    @property
    def taken_bytes(self) -> int:
        """Bytes that the peer's kernel has acknowledged so far: TCP_INFO of tcp(7).

        Where the system is not Linux, bytes that its own kernel has taken.
        """
        self._check_open()
        if sys.platform != "linux":
            return self.sent_bytes
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        return int(_BYTES_ACKED.unpack(info)[0])

    async def wait_send_all_might_not_block(self) -> None:
        """See trio.abc.SendStream."""
        async with self._sending:
            self._check_open()
            await trio.lowlevel.wait_writable(self.socket)

    # --- the end ----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._finished:
            raise trio.ClosedResourceError

    def finish(self) -> None:
        """Send the end of the stream, as far as it can be sent at once. Idempotent.

        Tasks that read or send now get trio.ClosedResourceError.
        """
        if not self._finished:
            if not self._broken:
                with suppress(ssl.SSLError):  # no close_notify of the peer yet, or no handshake
                    self.tls.unwrap()
                with suppress(BlockingIOError, trio.BrokenResourceError):
                    self._flush_now()
            self._finished = True
            trio.lowlevel.notify_closing(self.socket)
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)

    async def linger(self) -> None:
        """Call `finish`, and wait until the peer closes its side too (the caller bounds the time).

        A socket that is closed with unread data sends a TCP reset. The reset can overtake the last
        data that was sent, such as the reason of a refusal.
        """
        self.finish()
        left = MAX_LINGER_BYTES
        while left > 0 and self.socket.fileno() >= 0:
            try:
                data = self.socket.recv(self._receive_bytes)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.socket)
            except OSError:
                break
            else:
                if not data:
                    break
                left -= len(data)
                await trio.lowlevel.checkpoint()
                await self.take_turn()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Call `finish`, and close the socket."""
        self.finish()
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()
        await trio.lowlevel.checkpoint()
