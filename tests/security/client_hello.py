"""The first message of a TLS handshake, with as many groups and key shares as a test wants.

RFC 8446, section 4.1.2 and 4.2.
"""

import ssl
import struct
from contextlib import suppress

HANDSHAKE = b"\x16"
RECORD_OVERFLOW = bytes.fromhex("15030300020216")
"""The alert in its record, not encrypted."""
_GROUPS, _SHARES = 10, 51
_UNKNOWN_GROUP = 0x7777


def _ordinary() -> bytes:
    """The body of OpenSSL's own hello."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()[9:]  # the headers of record and message


def _listed(items: bytes) -> bytes:
    return struct.pack("!H", len(items)) + items


def client_hello(groups: int | None = None, shares: int | None = None) -> bytes:
    """A hello with so many groups more, and so many empty shares for the last group.

    Without a number it has what OpenSSL offers. With no share, the server asks for a second hello.
    """
    body = _ordinary()
    start = 34  # version and random bytes
    for width in (1, 2, 1):  # session id, ciphers, compression
        start += width + int.from_bytes(body[start : start + width])
    head, rest = body[:start], body[start + 2 :]
    extensions = b""
    while rest:
        kind, size = struct.unpack_from("!HH", rest)
        content, rest = rest[4 : 4 + size], rest[4 + size :]
        if kind == _GROUPS and groups is not None:
            more = [0x2000 + number % 0x1000 for number in range(groups - 1)] + [_UNKNOWN_GROUP]
            content = _listed(content[2:] + struct.pack(f"!{groups}H", *more))
        if kind == _SHARES and shares is not None:
            content = _listed(struct.pack("!HHB", _UNKNOWN_GROUP, 1, 0) * shares)
        extensions += struct.pack("!H", kind) + _listed(content)
    body = head + _listed(extensions)
    return b"\1" + len(body).to_bytes(3) + body


def records(message: bytes, size: int = 16_000) -> bytes:
    """The message in records of `size` bytes."""
    pieces = [message[start : start + size] for start in range(0, len(message), size)]
    return b"".join(HANDSHAKE + b"\3\1" + _listed(piece) for piece in pieces)
