"""Frames are handed over a few at a time, and small ones are counted."""

import pytest

from jobworker.server.connections.frame_scan import (
    CONTROL_COST,
    END_COST,
    FRAME_COST,
    SLICE_COST,
    SLICE_FRAMES,
    FrameScanner,
)

MASK = b"\1\2\3\4"
PONG = b"\x8a\x80" + MASK
EMPTY_PART = b"\x00\x80" + MASK
LAST_PART = b"\x80\x80" + MASK
MESSAGE = b"\x81\x82" + MASK + b"{}"


def part(size: int) -> bytes:
    """An unfinished part of a message with a payload."""
    if size < 126:
        return bytes([0, 0x80 | size]) + MASK + bytes(size)
    if size < 65_536:
        return b"\x00\xfe" + size.to_bytes(2) + MASK + bytes(size)
    return b"\x00\xff" + size.to_bytes(8) + MASK + bytes(size)


@pytest.mark.parametrize("kind", [PONG, EMPTY_PART, LAST_PART, MESSAGE, part(125), part(126)])
def test_many_frames_are_cut_into_slices(kind: bytes) -> None:
    scanner, data = FrameScanner(), kind * 20
    sizes = []
    while data:
        sizes.append(scanner.slice(data))
        data = data[sizes[-1] :]
    assert [size / len(kind) for size in sizes] == [SLICE_FRAMES, SLICE_FRAMES, 4]


@pytest.mark.parametrize("size", [512, 16_000, 65_535, 65_536, 300_000])
def test_large_frame_is_not_cut(size: int) -> None:
    scanner, data = FrameScanner(), part(size) + MESSAGE
    pieces = [data[at : at + 16_384] for at in range(0, len(data), 16_384)]
    assert [scanner.slice(piece) for piece in pieces] == [len(piece) for piece in pieces]
    assert scanner.take_small() == 0


@pytest.mark.parametrize("step", [1, 3, 7, 11])
def test_header_may_come_in_pieces(step: int) -> None:
    scanner = FrameScanner()
    data = (PONG + part(2000) + MESSAGE + part(70_000) + EMPTY_PART + b"\x89\x00") * 2
    for at in range(0, len(data), step):
        piece = data[at : at + step]
        while piece:
            piece = piece[scanner.slice(piece) :]
    assert scanner.take_small() == 6


def test_small_are_control_frames_and_unfinished_parts_with_little_in_them() -> None:
    scanner = FrameScanner()
    for data in (LAST_PART, MESSAGE, part(512)):
        scanner.slice(data)
        assert scanner.take_small() == 0
    for data in (PONG, EMPTY_PART, part(125), part(511), b"\x01\x81" + MASK + b"x"):
        scanner.slice(data)
        assert scanner.take_small() == 1


@pytest.mark.parametrize(
    ("data", "frames"),
    [
        (MESSAGE, FRAME_COST),
        (part(512) * 9, SLICE_FRAMES * FRAME_COST),
        (part(16_000)[:9000], FRAME_COST),
        (PONG * 2, 2 * CONTROL_COST),
        (b"\x88\x80" + MASK, END_COST),
        (b"\x83\x80" + MASK, END_COST),
        (b"\xc1\x80" + MASK, END_COST),
        (b"\x81\x00", END_COST),
        (PONG[:1], 0),
    ],
    ids=[
        "message",
        "parts",
        "half a part",
        "pongs",
        "closing",
        "reserved",
        "compressed",
        "unmasked",
        "half a header",
    ],
)
def test_a_slice_costs_by_its_frames_and_its_bytes(data: bytes, frames: int) -> None:
    scanner = FrameScanner()
    size = scanner.slice(data)
    assert scanner.cost == SLICE_COST + frames + size


def test_the_rest_of_a_frame_costs_something_however_little_comes_at_a_time() -> None:
    scanner = FrameScanner()
    scanner.slice(part(16_000)[:9000])
    scanner.slice(b"x")
    assert scanner.cost == SLICE_COST + 1
    scanner.slice(b"")
    assert scanner.cost == END_COST
