"""WebSocket frames (RFC 6455, section 5), as far as large output needs them to be fast.

wsproto speaks the protocol: handshake, text, control frames, fragments, masks, and what is wrong.
Output comes in binary messages of a frame each, up to a mebibyte long, and there its
copies and its layers of generators were most of what a byte cost. So whoever sends makes such
frames here, once for all who get them, and whoever receives looks at each frame's header: a whole
binary message is taken as it stands in the buffer, everything else goes to wsproto, frame by frame.
"""

import struct

from attrs import frozen

CONTINUATION, TEXT, BINARY, PING, PONG = 0x0, 0x1, 0x2, 0x9, 0xA
"""Opcodes: what a frame is."""
FINAL, MASKED = 0x80, 0x80
PIECE_BYTES = 63 << 14
"""Output in one message, at the most: whole TLS records (RFC 8446, section 5.1), and a message
below the mebibyte that some WebSocket libraries take if nobody tells them otherwise."""

Frame = tuple[bytes, bytes | bytearray]
"""A frame in two parts, to be sent one after the other: a large payload need not be copied."""


def frame_binary(start: bytes, payload: bytes | bytearray) -> Frame:
    """A whole binary message, `start` and then `payload`, in one unmasked frame, a server's."""
    return _header(BINARY, len(start) + len(payload)) + start, payload


def frame_text(text: str) -> Frame:
    """A whole text message in one unmasked frame."""
    payload = text.encode()
    return _header(TEXT, len(payload)), payload


def _header(opcode: int, size: int) -> bytes:
    if size < 126:
        return struct.pack("!BB", FINAL | opcode, size)
    if size < 1 << 16:
        return struct.pack("!BBH", FINAL | opcode, 126, size)
    return struct.pack("!BBQ", FINAL | opcode, 127, size)


@frozen
class FrameHeader:
    """What the first bytes of a frame say."""

    first: int
    """FIN, the reserved bits and the opcode, as they stand there."""
    masked: bool
    header_bytes: int
    payload_bytes: int

    @property
    def size(self) -> int:
        """Bytes of the whole frame."""
        return self.header_bytes + self.payload_bytes

    @property
    def whole_binary_message(self) -> bool:
        """Whether it is a binary message of its own, neither masked nor extended."""
        return self.first == FINAL | BINARY and not self.masked


def read_header(data: memoryview) -> FrameHeader | None:
    """The header at the start of `data`; None where more bytes are needed to tell."""
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
