"""Frames: the sender's are what RFC 6455 says, and the reader tells them from all others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameProtocol

from jobworker.protocol.frames import (
    BINARY,
    CONTINUATION,
    FINAL,
    PIECE_BYTES,
    PING,
    TEXT,
    FrameHeader,
    frame_binary,
    frame_text,
    read_header,
)

EDGES = {
    0: b"\x82\x00",
    125: b"\x82\x7d",
    126: b"\x82\x7e\x00\x7e",
    65_535: b"\x82\x7e\xff\xff",
    65_536: b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00",
}
"""Sizes at which the form of a header changes, and the headers: RFC 6455, section 5.2."""


def header_of(data: bytes) -> FrameHeader:
    header = read_header(memoryview(data))
    assert header is not None
    return header


@pytest.mark.parametrize("size", EDGES)
def test_header_has_the_form_of_its_size(size: int) -> None:
    start, payload = frame_binary(b"", bytes(size))
    assert start == EDGES[size]
    assert len(payload) == size


@pytest.mark.parametrize("size", EDGES)
def test_size_counts_both_parts(size: int) -> None:
    begin = b"x" * min(size, 10)
    start, _ = frame_binary(begin, bytes(size - len(begin)))
    assert start == EDGES[size] + begin


def test_payload_is_not_copied() -> None:
    payload = bytearray(b"payload")
    assert frame_binary(b"head", payload)[1] is payload


def test_text_is_counted_in_bytes() -> None:
    assert frame_text("äö") == (b"\x81\x04", "äö".encode())


@given(st.binary(max_size=300), st.binary(max_size=70_000))
def test_another_implementation_reads_the_same(start: bytes, payload: bytes) -> None:
    reader = FrameProtocol(client=True, extensions=[])
    reader.receive_bytes(b"".join(frame_binary(start, payload)))
    (frame,) = reader.received_frames()
    assert isinstance(frame.payload, bytes | bytearray)
    assert (bytes(frame.payload), frame.message_finished) == (start + payload, True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", EDGES)
def test_header_is_read_once_its_size_is_there(size: int, *, masked: bool) -> None:
    """The mask of four bytes belongs to the header, and its bytes are not needed to know that."""
    first, second, *rest = EDGES[size]
    data = bytes([first, second | (0x80 if masked else 0), *rest])
    for short in range(len(data)):
        assert read_header(memoryview(data)[:short]) is None
    header = header_of(data)
    assert header.header_bytes == len(data) + (4 if masked else 0)
    assert header.payload_bytes == size
    assert header.size == header.header_bytes + size
    assert header.masked is masked
    assert header_of(data + b"more") == header


@pytest.mark.parametrize(
    ("first", "whole"),
    [
        (FINAL | BINARY, True),
        (BINARY, False),
        (FINAL | CONTINUATION, False),
        (FINAL | TEXT, False),
        (FINAL | PING, False),
        (FINAL | BINARY | 0x40, False),
    ],
)
def test_only_a_whole_plain_binary_message_is_one(first: int, *, whole: bool) -> None:
    assert header_of(bytes([first, 5])).whole_binary_message is whole
    assert not header_of(bytes([first, 0x85])).whole_binary_message, "a masked one"


def test_piece_fills_whole_records_and_leaves_room_for_its_header_below_a_mebibyte() -> None:
    assert PIECE_BYTES % 16_384 == 0
    assert (1 << 20) - 16_384 <= PIECE_BYTES < 1 << 20
