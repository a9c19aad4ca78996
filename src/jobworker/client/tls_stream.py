"""TLS over TCP for one reader and one writer: what is there is read at once.

trio.SSLStream gives one TLS record (16 KiB) for each await. Here a read goes on, without one,
until the caller's buffer is full or nothing is left of what TCP has brought; it is decrypted into
that buffer, so it is not copied either.

In TLS 1.3 the server judges our certificate after the handshake is over on this side; its alert
then stands in what is read next. Whatever fails is raised as trio.BrokenResourceError, whose cause
is the ssl.SSLError or OSError.
"""

import ssl
from contextlib import suppress

import trio

RECEIVE_BYTES = 262_144
CLOSE_SECONDS = 1.0


class TLSStream:
    """The client's side of a TLS connection."""

    def __init__(self, tcp: trio.SocketStream, context: ssl.SSLContext, server_name: str) -> None:
        self._tcp = tcp
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._sending = trio.StrictFIFOLock()
        self._broken = False

    async def do_handshake(self) -> None:
        """Shake hands. A server that we refuse is told why."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._receive_more()
            except ssl.SSLError as error:
                with suppress(trio.BrokenResourceError), trio.move_on_after(CLOSE_SECONDS):
                    await self._flush()
                raise trio.BrokenResourceError from error
            else:
                await self._flush()
                return

    async def receive_into(self, buffer: memoryview) -> int:
        """Wait for something to read: how many bytes now stand in `buffer`; 0 is the end."""
        while True:
            filled = self._read_into(buffer)
            if filled is not None:
                await trio.lowlevel.checkpoint()
                return filled
            await self._receive_more()

    def _read_into(self, buffer: memoryview) -> int | None:
        """Decrypt what is there: None where nothing is, 0 at the end."""
        filled = 0
        try:
            while filled < len(buffer):
                count = self._tls.read(len(buffer) - filled, buffer[filled:])
                if not count:
                    break
                filled += int(count)  # with a buffer it is a number, whatever typeshed says
        except ssl.SSLWantReadError:
            return filled or None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):  # WebSocket has an end of its own
            return filled
        except ssl.SSLError as error:
            if not filled:  # else it is met again
                raise trio.BrokenResourceError from error
        return filled

    async def _receive_more(self) -> None:
        data = await self._tcp.receive_some(RECEIVE_BYTES)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def send_all(self, data: bytes) -> None:
        """Send all of `data`; if cancelled, the stream is broken."""
        async with self._sending:
            if self._broken:
                raise trio.BrokenResourceError("an earlier send was cut short")
            done = 0
            try:
                while done < len(data):
                    done += self._tls.write(data[done:] if done else data)
            except ssl.SSLError as error:
                raise trio.BrokenResourceError from error
            await self._send_outgoing()

    async def _flush(self) -> None:
        async with self._sending:
            await self._send_outgoing()

    async def _send_outgoing(self) -> None:
        data = self._outgoing.read()
        if data:
            self._broken = True
            await self._tcp.send_all(data)
            self._broken = False

    async def aclose(self) -> None:
        """Say that nothing follows, as far as that can be sent now, and close."""
        try:
            if not self._broken:
                with suppress(ssl.SSLError):
                    self._tls.unwrap()
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    with trio.move_on_after(CLOSE_SECONDS):
                        await self._flush()
        finally:
            await self._tcp.aclose()
