"""A fast path for the WebSocket frames of output (RFC 6455, section 5).

wsproto implements the protocol: handshake, text, control frames, fragments, masks, and violations.
Output is in binary messages of one frame each, up to a mebibyte long, and for these the copies and
layers of generators in wsproto were most of the cost of a byte. So the sender makes such frames
here, once for all followers. The receiver reads each frame's header here: it uses a whole binary
message directly in the receive buffer, and passes all other frames to wsproto.
"""

import struct

from attrs import frozen

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
"""Opcodes: the type of a frame."""
FINAL, MASKED = 0x80, 0x80
PIECE_BYTES = 63 << 14
"""Maximum of output in one message: a multiple of a TLS record (RFC 8446, section 5.1), and below
the mebibyte that is the default bound of some WebSocket libraries."""

MAX_REASON_BYTES = 120
"""The longest reason of a closing frame; a control frame holds 125 bytes (RFC 6455, 5.5)."""

Frame = tuple[bytes, bytes | bytearray]
"""A frame in two parts, which are sent one after the other: a large payload is not copied."""


def frame_binary(start: bytes, payload: bytes | bytearray) -> Frame:
    """Make a whole binary message of `start` and `payload` in one unmasked (server's) frame."""
    return _header(BINARY, len(start) + len(payload)) + start, payload


def frame_text(text: str) -> Frame:
    """Make a whole text message in one unmasked frame."""
    payload = text.encode()
    return _header(TEXT, len(payload)), payload


def frame_close(code: int, reason: str) -> bytes:
    """Make a closing frame, unmasked; a reason that is too long for a control frame is cut."""
    payload = struct.pack("!H", code) + closing_reason(reason).encode()
    return _header(CLOSE, len(payload)) + payload


def closing_reason(reason: str) -> str:
    """As much of a reason as a closing frame holds."""
    return reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")


def _header(opcode: int, size: int) -> bytes:
    if size < 126:
        return struct.pack("!BB", FINAL | opcode, size)
    if size < 1 << 16:
        return struct.pack("!BBH", FINAL | opcode, 126, size)
    return struct.pack("!BBQ", FINAL | opcode, 127, size)


@frozen
class FrameHeader:
    """The header of a frame."""

    first: int
    """The first byte: FIN, the reserved bits and the opcode."""
    masked: bool
    header_bytes: int
    payload_bytes: int

    @property
    def size(self) -> int:
        """Bytes of the whole frame."""
        return self.header_bytes + self.payload_bytes

    @property
    def whole_binary_message(self) -> bool:
        """Whether the frame is a whole binary message, unmasked and without extensions."""
        return self.first == FINAL | BINARY and not self.masked


def read_header(data: memoryview) -> FrameHeader | None:
    """Read the header at the start of `data`; None if it is not complete yet."""
    if len(data) < 2:
        return None
    first, second = data[0], data[1]
    masked, length = bool(second & MASKED), second & 0x7F
    size = 2
    if length >= 126:
        size = 4 if length == 126 else 10
        if len(data) < size:
            return None
        length = int.from_bytes(data[2:size], "big")
    return FrameHeader(first, masked, size + (4 if masked else 0), length)
