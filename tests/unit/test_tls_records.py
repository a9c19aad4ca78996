"""OpenSSL gets one record at a time, and none that exceeds the bounds of a handshake."""

import math
import ssl

import pytest

from jobworker.tls_records import HandshakeBounds, IncomingRecords

HELLO, CHANGE, ENCRYPTED = 22, 20, 23


def record(kind: int, size: int) -> bytes:
    """A record of `size` bytes, with its header of five."""
    return bytes([kind, 3, 3]) + (size - 5).to_bytes(2) + bytes(size - 5)


def refused(kind: int) -> bytes:
    """What OpenSSL gets in place of a record: a header with a length that none may have."""
    return bytes([kind, 3, 3, 255, 255])


def given(
    bounds: HandshakeBounds, *records: bytes, piece: int = 1 << 20
) -> tuple[list[bytes], str]:
    """What OpenSSL gets each time when the records come in pieces; and the excess."""
    buffer = ssl.MemoryBIO()
    incoming = IncomingRecords(buffer, bounds)
    data, taken = b"".join(records), list[bytes]()
    for start in range(0, len(data), piece):
        incoming.receive(data[start : start + piece])
        while buffer.pending and not incoming.excess:
            taken.append(buffer.read())
            incoming.give()
        if incoming.excess:
            return [*taken, buffer.read()], incoming.excess
    return taken, incoming.excess


def test_records_come_one_at_a_time() -> None:
    records = [record(HELLO, 100), record(CHANGE, 6), record(ENCRYPTED, 5), record(HELLO, 7)]
    assert given(HandshakeBounds(), *records) == (records, "")


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_hellos_are_bounded_together_however_they_come(piece: int) -> None:
    """A server may ask for a second hello, and a client may split each one over many records."""
    bounds = HandshakeBounds(plain=60)
    short = [record(HELLO, 30), record(ENCRYPTED, 500), record(HELLO, 30)]
    taken, excess = given(bounds, *short, piece=piece)
    assert (b"".join(taken), excess) == (b"".join(short), "")
    taken, excess = given(bounds, *short, record(HELLO, 5), piece=piece)
    assert b"".join(taken) == b"".join(short) + refused(HELLO)
    assert "hello" in excess


@pytest.mark.parametrize("last", [HELLO, CHANGE, ENCRYPTED])
def test_all_records_of_a_handshake_are_bounded(last: int) -> None:
    bounds = HandshakeBounds(plain=math.inf, total=1000)
    first = record(ENCRYPTED, 995)
    assert given(bounds, first, record(last, 5)) == ([first, record(last, 5)], "")
    taken, excess = given(bounds, first, record(last, 6))
    assert taken == [first, refused(last)]
    assert "certificates" in excess


@pytest.mark.parametrize(
    "words", [b"POST /x HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 50]
)
def test_what_is_no_tls_reaches_openssl_as_it_is(words: bytes) -> None:
    """OpenSSL knows plain HTTP, which the server answers."""
    taken, excess = given(HandshakeBounds(plain=20, total=20), words)
    assert (b"".join(taken), excess) == (words, "")


def test_nothing_is_bounded_after_the_handshake() -> None:
    buffer = ssl.MemoryBIO()
    incoming = IncomingRecords(buffer, HandshakeBounds(plain=10, total=20))
    incoming.end_handshake()
    for kind in (HELLO, ENCRYPTED):
        incoming.receive(record(kind, 10_000))
        assert buffer.read() == record(kind, 10_000)
    incoming.receive(b"\x17")
    incoming.end()
    assert buffer.read() == b"\x17"
    assert buffer.eof
    assert incoming.excess == ""
