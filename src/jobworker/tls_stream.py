"""TLS over TCP, either side's, for one reader and any number of writers; fast for large output.

OpenSSL works on two buffers in memory, never on the socket: there a peer's messages below the
application (RFC 8446, section 4.6) would hold the event loop for as long as they came, and a
half-sent record would stand in the way of all else. It gets one record at a time, since it makes
all changes of keys (section 4.6.3) that it has before it returns: six hundred took 10 to 20 ms.
trio.SSLStream has such buffers too, but reads a record (16 KiB) at a time and encrypts a message as
a whole. Here a message is encrypted and sent a few records at a time, so that what is copied stays
in the processor's cache, and a read goes on while there is more, so that a large message costs few
turns of the loop.

A message that was cut off breaks the stream for all who would send after it. An end of which TLS
said nothing reads like any other: WebSocket has one of its own. In TLS 1.3 the server judges the
client's certificate after the handshake is over on the client's side (RFC 8446, section 2); its
alert then stands in what the client reads next. Whatever else fails is raised as
trio.BrokenResourceError, whose cause is the ssl.SSLError or OSError.
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

T = TypeVar("T")
Data = bytes | bytearray | memoryview

RECORD_BYTES = 16_384
"""Of plain text, at the most: RFC 8446, section 5.1."""
RECORD_HEADER_BYTES = 5
BATCH_BYTES = 4 * RECORD_BYTES
MAX_LINGER_BYTES = 16 << 20
LEAST_TAKEN_BYTES = 4096
"""Who takes less in `stall_seconds` takes nothing."""
_DER = 2
"""ENCODING_DER of CPython's module _ssl."""
_BYTES_ACKED = struct.Struct("=120xQ")
"""Of struct tcp_info, linux/tcp.h."""


async def _at_once() -> None:
    pass


class TLSStream(trio.abc.Stream):
    """One side of a TLS connection over the socket of `tcp`, which it takes over."""

    def __init__(
        self,
        tcp: trio.SocketStream,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_name: str | None = None,
        receive_bytes: int = RECORD_BYTES,
        take_turn: Callable[[], Awaitable[None]] = _at_once,
    ) -> None:
        """`receive_bytes` is what is taken from the socket in one turn of the loop."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_name
        )
        """To be asked about the peer's certificate."""
        taken = tcp.socket
        self.socket = socket.socket(taken.family, taken.type, taken.proto, fileno=taken.detach())
        """What it runs over."""
        self.socket.setblocking(False)
        self.stall_seconds = math.inf
        """How long a peer may take nothing of what is being sent to it."""
        self.take_turn = take_turn
        """Waits until a record, or the part of one that has come, may be decrypted or dropped."""
        self._receive_bytes = receive_bytes
        self._received = memoryview(b"")
        """What OpenSSL was not given yet."""
        self._record_left = 0
        """What it was not given yet of the record that it has the beginning of."""
        self._unsent = memoryview(b"")
        self._sending = trio.StrictFIFOLock()
        self._broken = self._finished = False

    async def do_handshake(self) -> None:
        """Shake hands. A peer that is refused is told why, as far as that can be sent now."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                if not self._give_record():
                    await self._flush()
                    await self._receive_more()
                    await trio.lowlevel.checkpoint()
                await self.take_turn()
            except ssl.SSLError as error:
                with suppress(BlockingIOError, trio.BrokenResourceError):
                    self._flush_now()
                raise trio.BrokenResourceError from error
            else:
                await self._flush()
                return

    @property
    def peer_certificate(self) -> Mapping[str, object]:
        """The peer's certificate, after the handshake, as `ssl.SSLObject.getpeercert` tells it."""
        return self.tls.getpeercert() or {}

    @property
    def peer_chain(self) -> tuple[bytes, ...]:
        """The certificates that the peer has presented, in DER, its own first.

        Python has that in public since 3.13; before, the object within has it (3.10 to 3.12).
        """
        if sys.version_info >= (3, 13):
            return tuple(self.tls.get_unverified_chain())
        inner = self.tls._sslobj  # type: ignore[attr-defined]
        return tuple(each.public_bytes(_DER) for each in inner.get_unverified_chain() or ())

    # --- reading ----------------------------------------------------------------------------

    async def receive_into(self, buffer: memoryview) -> int:
        """Wait for something to read: how many bytes now stand in `buffer`; 0 is the end."""
        return await self._receive(lambda: self._read_into(buffer))

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio.abc.ReceiveStream; a record's content at the most."""
        size = min(max_bytes or RECORD_BYTES, RECORD_BYTES)
        return await self._receive(lambda: self._read_some(size))

    async def _receive(self, read: Callable[[], T | None]) -> T:
        """Wait until there is something to `read`, which gives None where there is nothing."""
        await trio.lowlevel.checkpoint_if_cancelled()
        yielded = fruitless = False
        while True:
            self._check_open()
            if self._outgoing.pending:  # the answer to a change of keys
                await self._flush()
            found = read()
            if found is not None:
                if not yielded:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                return found
            if fruitless:  # messages below the application, of which a peer may send any number
                await trio.lowlevel.checkpoint()
            fruitless = True
            if not self._give_record():
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
        """Decrypt what there is: None where that is nothing, 0 at the end."""
        filled = at_last_receive = 0
        try:
            while filled < len(buffer):
                try:
                    count = int(self.tls.read(len(buffer) - filled, buffer[filled:]))  # type: ignore[call-overload, unused-ignore]
                except ssl.SSLWantReadError:
                    if self._give_record():
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
            if not filled:  # else it is met again
                raise trio.BrokenResourceError from error
        return filled

    async def _receive_more(self) -> bool:
        """Wait until something has come; whether that took a turn of the loop."""
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
            self._received = memoryview(bytes(self._received) + data if self._received else data)
            self._give_record()
        else:
            if self._received:
                self._incoming.write(self._received)
            self._received = memoryview(b"")
            self._incoming.write_eof()
        return True

    def _give_record(self) -> bool:
        """Give OpenSSL the next record, or what has come of it; False where that is nothing."""
        received = self._received
        if not self._record_left and len(received) >= RECORD_HEADER_BYTES:
            length = int.from_bytes(received[3:RECORD_HEADER_BYTES])
            self._record_left = RECORD_HEADER_BYTES + length
        given = received[: self._record_left]
        if not given:
            return False
        self._incoming.write(given)
        self._record_left -= len(given)
        more = len(received) > len(given)  # an empty view would hold all that it was cut from
        self._received = received[len(given) :] if more else memoryview(b"")
        return True

    # --- sending ----------------------------------------------------------------------------

    async def send_all(self, data: Data, *more: Data) -> None:
        """Send all of it, `more` too; several tasks may, and what each sends stays together.

        If cancelled half way, the stream is broken. Raises trio.TooSlowError where the peer takes
        nothing for `stall_seconds` (or twice that), not where it is merely slow.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._sending.acquire_nowait()  # a turn of the loop less, for each of many pieces
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
        """Send what is encrypted; whether that took a turn of the loop."""
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
        """Send what is encrypted. Raises BlockingIOError where there is no room for the rest."""
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
            # An empty view would hold all that it was cut from, for as long as nothing is sent.
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
    def taken_bytes(self) -> int:
        """What the peer's kernel has acknowledged so far: tcpi_bytes_acked, tcp(7). Linux only."""
        self._check_open()
        told = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        return int(_BYTES_ACKED.unpack(told)[0])

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
        """Say that nothing follows, as far as that can be sent now; a second call does nothing.

        Those who read or send are told that the stream is closed.
        """
        if not self._finished:
            if not self._broken:
                with suppress(ssl.SSLError):  # it waits for the peer's word, or had no handshake
                    self.tls.unwrap()
                with suppress(BlockingIOError, trio.BrokenResourceError):
                    self._flush_now()
            self._finished = True
            trio.lowlevel.notify_closing(self.socket)
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)

    async def linger(self) -> None:
        """Finish, and wait until the peer does too (the caller bounds the time).

        A socket that is closed while something unread stands in it sends a reset, which overtakes
        what was sent last: the reason of a refusal.
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
        """Finish and close."""
        self.finish()
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()
        await trio.lowlevel.checkpoint()
