"""The received records of a TLS connection, which OpenSSL gets one at a time.

OpenSSL handles all key updates (RFC 8446, section 4.6.3) that it has before it returns: six hundred
took 10 to 20 ms. It handles a whole handshake message in one call too. It looks up each key share
of a hello in the client's list of groups, and parses each certificate: a hello of 64 KiB took 60 to
90 ms, and certificates of 100 KB took 37 ms. So a server bounds the bytes of a handshake.
"""

import math
import ssl
from typing import NamedTuple

RECORD_HEADER_BYTES = 5
_KINDS = range(20, 24)
"""The types of records: RFC 8446, section 5.1."""
_PLAIN_HANDSHAKE = 22
"""The type of a record with handshake messages that are not encrypted: RFC 8446, section 5.1."""
_TOO_LONG = b"\3\3\xff\xff"
"""Version and length of a record that is longer than any. OpenSSL refuses it by its header."""


class HandshakeBounds(NamedTuple):
    """The most bytes of TLS records, with their headers, that a peer may send in its handshake."""

    plain: float = math.inf
    """In records with handshake messages that are not encrypted. In TLS 1.3 that are the hellos of
    a client, also the second one that the server may ask for."""
    total: float = math.inf
    """In all records: the certificates as well."""


class IncomingRecords:
    """Bytes from the socket, on their way to OpenSSL's buffer."""

    def __init__(self, buffer: ssl.MemoryBIO, bounds: HandshakeBounds) -> None:
        """`bounds` apply until `end_handshake`."""
        self._buffer = buffer
        self._received = memoryview(b"")
        """Bytes from the socket that OpenSSL did not get yet."""
        self._record_left = 0
        """Bytes that OpenSSL did not get yet of the record whose beginning it has."""
        self._plain_left, self._total_left = bounds
        """Bytes that the peer may still send in its handshake."""
        self.excess = ""
        """Which bound the peer has exceeded, in words; empty if none."""

    def receive(self, data: bytes) -> None:
        """Add bytes from the socket, and give OpenSSL the next record."""
        self._received = memoryview(bytes(self._received) + data if self._received else data)
        self.give()

    def end(self) -> None:
        """Give OpenSSL all bytes that are left, and the end of the stream."""
        if self._received:
            self._buffer.write(self._received)
        self._received = memoryview(b"")
        self._buffer.write_eof()

    def end_handshake(self) -> None:
        """Lift the bounds."""
        self._plain_left = self._total_left = math.inf

    def give(self) -> bool:
        """Pass the next record to OpenSSL, or the received part of it; False if there is none."""
        received = self._received
        if not self._record_left and len(received) >= RECORD_HEADER_BYTES:
            length = int.from_bytes(received[3:RECORD_HEADER_BYTES])
            self._record_left = RECORD_HEADER_BYTES + length
            if self._exceeds_bounds(received[0]):
                # In place of the record, so that OpenSSL sends the alert record_overflow.
                self._buffer.write(bytes(received[:1]) + _TOO_LONG)
                return True
        given = received[: self._record_left]
        if not given:
            return False
        self._buffer.write(given)
        self._record_left -= len(given)
        more = len(received) > len(given)  # an empty view would keep the whole buffer alive
        self._received = received[len(given) :] if more else memoryview(b"")
        return True

    def _exceeds_bounds(self, kind: int) -> bool:
        """Whether the record that begins exceeds a bound of the handshake."""
        if kind not in _KINDS:  # not TLS: OpenSSL refuses it, and knows plain HTTP
            return False
        self._total_left -= self._record_left
        if kind == _PLAIN_HANDSHAKE:
            self._plain_left -= self._record_left
            if self._plain_left < 0:
                self.excess = "the client's hello is too long"
        if self._total_left < 0 and not self.excess:
            self.excess = "the client's certificates are too long"
        return bool(self.excess)
