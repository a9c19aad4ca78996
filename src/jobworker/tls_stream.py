"""TLS over TCP, either side's: OpenSSL on the socket itself, for one reader and any writers.

trio.SSLStream keeps OpenSSL away from the socket, behind two buffers in memory: each byte is copied
twice more on either side, and each read gives a record (16 KiB) at most. Here OpenSSL reads and
writes the non-blocking socket and Trio waits for it alone, and a read goes on until the caller's
buffer is full or nothing more has come.

Reading does not have to write, nor writing to read: nothing is renegotiated (`pki.tls`). Only a
peer that asks for new keys (RFC 8446, section 4.6.3) is answered at once. Where it asks and takes
nothing, so that a record stands half sent, OpenSSL gives the connection up. A message that was cut
off breaks the stream for all who would send after it.

An end of which TLS said nothing, a reset too, reads like any other end: WebSocket has one of its
own. In TLS 1.3 the server judges the client's certificate after the handshake is over on the
client's side (RFC 8446, section 2); its alert then stands in what the client reads next. Whatever
else fails is raised as trio.BrokenResourceError, whose cause is the ssl.SSLError or OSError.
"""

import math
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import trio

T = TypeVar("T")
Data = bytes | bytearray | memoryview

RECEIVE_BYTES = 65_536
MAX_LINGER_BYTES = 16 << 20
_BYTES_ACKED = struct.Struct("=120xQ")
"""Of struct tcp_info, linux/tcp.h."""


class TLSStream(trio.abc.Stream):
    """One side of a TLS connection over the socket of `tcp`, which it takes over."""

    def __init__(
        self,
        tcp: trio.SocketStream,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_name: str | None = None,
    ) -> None:
        taken = tcp.socket
        plain = socket.socket(taken.family, taken.type, taken.proto, fileno=taken.detach())
        plain.setblocking(False)
        try:
            plain.getpeername()  # `wrap_socket` would lose the socket of a peer that is gone
            self._socket = context.wrap_socket(
                plain,
                server_side=server_side,
                server_hostname=server_name,
                do_handshake_on_connect=False,
            )
        except BaseException as error:
            plain.close()
            if isinstance(error, OSError):
                raise trio.BrokenResourceError from error
            raise
        self.stall_seconds = math.inf
        """How long a peer may take nothing of what is being sent to it."""
        self._sending = trio.StrictFIFOLock()
        self._broken = self._finished = False

    async def do_handshake(self) -> None:
        """Shake hands. A peer that is refused has been sent an alert that says why."""
        await self._patiently(self._socket.do_handshake)

    @property
    def socket(self) -> ssl.SSLSocket:
        """What it runs over, to be asked: for options, names and certificates."""
        return self._socket

    # --- reading ----------------------------------------------------------------------------

    async def receive_into(self, buffer: memoryview) -> int:
        """Wait for something to read: how many bytes now stand in `buffer`; 0 is the end."""
        return await self._patiently(lambda: self._read_into(buffer))

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio.abc.ReceiveStream."""
        size = max_bytes or RECEIVE_BYTES
        return await self._patiently(lambda: self._socket.recv(size))

    def _read_into(self, buffer: memoryview) -> int:
        filled = 0
        try:
            while filled < len(buffer):
                count = self._socket.recv_into(buffer[filled:])
                if not count:
                    break
                filled += count
        except OSError:
            if not filled:  # else it is met again
                raise
        return filled

    # --- sending ----------------------------------------------------------------------------

    async def send_all(self, data: Data, *more: Data) -> None:
        """Send all of it, `more` too; several tasks may, and what each sends stays together.

        If cancelled half way, the stream is broken. Raises trio.TooSlowError where the peer takes
        nothing for `stall_seconds`, not where it is merely slow.
        """
        try:
            self._sending.acquire_nowait()  # a turn of the loop less, for each of many pieces
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if self._broken:
                raise trio.BrokenResourceError("an earlier message was cut off")
            await self._write([memoryview(part) for part in (data, *more)])
        finally:
            self._sending.release()

    async def _write(self, parts: list[memoryview]) -> None:
        def write() -> None:
            self._broken = True  # once begun, OpenSSL has to go on with the same bytes
            while parts:
                while rest := parts[0]:
                    parts[0] = rest[self._socket.send(rest) :]  # a record at a time
                del parts[0]
            self._broken = False

        await self._patiently(write)

    async def wait_send_all_might_not_block(self) -> None:
        """See trio.abc.SendStream."""
        async with self._sending:
            await trio.lowlevel.wait_writable(self._socket)

    async def _wait_for_room(self) -> None:
        taken = -1
        while True:
            if self.stall_seconds < math.inf:
                before, taken = taken, self.taken_bytes
                if taken == before:
                    raise trio.TooSlowError
            with trio.move_on_after(self.stall_seconds):
                await trio.lowlevel.wait_writable(self._socket)
                return

    @property
    def taken_bytes(self) -> int:
        """What the peer's kernel has acknowledged so far: tcpi_bytes_acked, tcp(7). Linux only."""
        if self._socket.fileno() < 0:
            raise trio.ClosedResourceError
        told = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        return int(_BYTES_ACKED.unpack(told)[0])

    # --- both -------------------------------------------------------------------------------

    async def _patiently(self, work: Callable[[], T], *, lingering: bool = False) -> T:
        """Do `work` as soon as the socket lets it; what was done is done, cancelled or not."""
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while True:
            if self._socket.fileno() < 0 or self._finished is not lingering:
                raise trio.ClosedResourceError
            try:
                done = work()
            except (ssl.SSLWantReadError, BlockingIOError):
                await trio.lowlevel.wait_readable(self._socket)
            except ssl.SSLWantWriteError:
                await self._wait_for_room()
            except OSError as error:
                raise trio.BrokenResourceError from error
            else:
                if not waited:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                return done
            waited = True

    async def linger(self) -> None:
        """Send nothing more, and wait until the peer does not either (the caller bounds the time).

        A socket that is closed while something unread stands in it sends a reset, which overtakes
        what was sent last: the reason of a refusal. Others who read or send are told that the
        stream is closed. Raises trio.BrokenResourceError where the peer is gone.
        """
        self._finish()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)  # it is a plain socket from here on
        for _ in range(MAX_LINGER_BYTES // RECEIVE_BYTES):
            if not await self._patiently(lambda: self._socket.recv(RECEIVE_BYTES), lingering=True):
                return

    def _finish(self) -> None:
        if not self._finished:
            self._finished = True
            if not self._broken:
                with suppress(OSError):  # no room, or no handshake before
                    self._socket.unwrap()
            trio.lowlevel.notify_closing(self._socket)

    async def aclose(self) -> None:
        """Say that nothing follows, as far as that can be sent now, and close."""
        if self._socket.fileno() >= 0:
            self._finish()
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        await trio.lowlevel.checkpoint()
