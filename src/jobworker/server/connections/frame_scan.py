"""A scanner for the beginnings of WebSocket frames in a client's bytes: RFC 6455, section 5.2.

trio-websocket parses all frames that it gets in one turn of the event loop, unless a frame makes it
wait: 2,700 pongs of 6 bytes take 45 ms, in which no other client is served. So it gets a few frames
at a time. The scanner reads only the headers. A large frame, as honest clients send it, costs as
much as a small one and is not cut.

The scanner also computes the cost of each slice. So a name gets its part of each turn, however many
connections it has and however it cuts its data into frames (`http_head.PrefixStream`).

The scanner also counts small frames. Control frames and short parts of a message cost the service
as much as a request does, and request nothing, so their rate is limited (`conversation`).

Sans-IO. The scanner does not check the protocol: wsproto refuses frames that break it.
"""

from attrs import define, field

from jobworker.protocol.frames import BINARY, CONTINUATION, FINAL, MASKED, PING, PONG, TEXT

SLICE_FRAMES = 8
"""The most frames that are handed over at a time: they take wsproto some 0.15 ms."""
SLICE_COST, FRAME_COST, CONTROL_COST = 16_384, 4096, 32_768
"""The fixed costs of a slice, of each frame in it, and of each control frame, which may need an
answer. The unit is the bytes that are unmasked in the same time."""
END_COST = 65_536
"""The cost of a connection's end, with a closing frame, with an invalid frame or without any."""
RECORD_COST = 16_384
"""The cost of a TLS record or a part of one, whether it carries data or changes the keys."""
SMALL_BYTES = 512
"""A part of a message with fewer bytes is small. Clients that cut messages cut them at the size of
a buffer, which is hardly ever smaller: Go's gorilla/websocket has 4 KiB, and 1 KiB in its usual
example."""
_HEADER_BYTES = 2
_MASK_BYTES = 4
_LONGEST_HEADER_BYTES = 14
_RESERVED, _OPCODE, _CONTROL, _LENGTH = 0x70, 0x0F, 0x08, 0x7F
_GOES_ON = frozenset({CONTINUATION, TEXT, BINARY, PING, PONG})
"""Opcodes after which a connection may go on: parts of messages, ping, pong."""
_LENGTH_BYTES = {126: 2, 127: 8}


@define(eq=False)
class FrameScanner:
    """Scans the incoming bytes of one connection."""

    _header: bytes = field(default=b"", init=False)
    """The beginning of a header whose end has not come yet."""
    _payload_left: int = field(default=0, init=False)
    _small: int = field(default=0, init=False)
    cost: int = field(default=0, init=False)
    """The cost of the last slice, in bytes that are unmasked in the same time."""

    def slice(self, data: bytes) -> int:
        """How many of these bytes to hand over at once; pass the rest to the next call."""
        self.cost = SLICE_COST if data else END_COST
        size = self._slice(data)
        self.cost += size
        return size

    def _slice(self, data: bytes) -> int:
        at = frames = 0
        while at < len(data):
            if self._payload_left:
                step = min(self._payload_left, len(data) - at)
                at += step
                self._payload_left -= step
                continue
            if frames == SLICE_FRAMES:
                break
            before = len(self._header)
            header = self._header + data[at : at + _LONGEST_HEADER_BYTES - before]
            size = _header_size(header)
            if size > len(header):
                self._header = header
                return len(data)
            at += size - before
            self._header = b""
            self._begin(header)
            frames += 1
        return at

    def take_small(self) -> int:
        """How many small frames have begun since the last call."""
        small, self._small = self._small, 0
        return small

    def _begin(self, header: bytes) -> None:
        length = header[1] & _LENGTH
        if more := _LENGTH_BYTES.get(length):
            length = int.from_bytes(header[_HEADER_BYTES : _HEADER_BYTES + more])
        self._payload_left = length
        opcode, unfinished = header[0] & _OPCODE, not header[0] & FINAL
        control = opcode & _CONTROL
        if opcode not in _GOES_ON or header[0] & _RESERVED or not header[1] & MASKED:
            self.cost += END_COST
        else:
            self.cost += CONTROL_COST if control else FRAME_COST
        if control or (unfinished and length < SMALL_BYTES):
            self._small += 1


def _header_size(header: bytes) -> int:
    if len(header) < _HEADER_BYTES:
        return _HEADER_BYTES
    size = _HEADER_BYTES + _LENGTH_BYTES.get(header[1] & _LENGTH, 0)
    return size + _MASK_BYTES if header[1] & MASKED else size
