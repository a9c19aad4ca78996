"""Messages with descriptors over a SOCK_SEQPACKET socket, between service, launcher and child.

One packet is one message: a JSON object in UTF-8, with up to `MAX_DESCRIPTORS` descriptors. A body
that does not fit in a packet travels in a sealed memfd, the first descriptor of its packet. So a
message is never sent in parts, and a sender never waits for the receiver to read a part.

The receiver does not trust the sender. It reads a body only from a memfd that is sealed against
writing and shrinking, since any other descriptor could block the reader or change while it reads.
It reads at most `MAX_BODY_BYTES`.

`encode` and `decode` do no I/O on the socket. Each side sends and receives in its own way: the
launcher never blocks, the service awaits Trio's socket, the child blocks.
"""

import array
import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence

from jobworker.errors import ProtocolError
from jobworker.serialization import json_pieces

MAX_DESCRIPTORS = 16
MAX_INLINE_BYTES = 32 << 10
MAX_BODY_BYTES = 4 << 20
PACKET_BYTES = MAX_INLINE_BYTES + 1
ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)

_INLINE, _ATTACHED = b"i", b"a"
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

Ancillary = list[tuple[int, int, bytes]]
Message = dict[str, object]


def encode(message: Message, descriptors: Sequence[int]) -> tuple[bytes, Ancillary, list[int]]:
    """The packet and ancillary data of `message`, and the descriptors to close once it is sent.

    Raises ProtocolError for a message of more than `MAX_BODY_BYTES`, and OSError if the kernel has
    no memfd for a large one.
    """
    return pack(body_of(message), descriptors)


def body_of(message: Message) -> bytes:
    """The body of a message, encoded at once, for `pack`."""
    return _ENCODER.encode(message).encode()


def pieces(message: Message) -> Iterator[str]:
    """The body of a message in small pieces, so that the caller can do other work in between."""
    return json_pieces.pieces(message, _ENCODER.encode)


def pack(body: bytes, descriptors: Sequence[int]) -> tuple[bytes, Ancillary, list[int]]:
    """As `encode`, for a body that is encoded already."""
    if len(body) > MAX_BODY_BYTES:
        raise ProtocolError(f"cannot send a message of {len(body)} bytes: the bound is 4 MiB")
    packet, passed, to_close = _INLINE + body, list(descriptors), []
    if len(body) > MAX_INLINE_BYTES:
        memory = _sealed(body)
        to_close.append(memory)
        passed.insert(0, memory)
        packet = _ATTACHED
    ancillary: Ancillary = []
    if passed:
        rights = array.array("i", passed).tobytes()
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, rights))
    return packet, ancillary, to_close


def _sealed(body: bytes) -> int:
    """A memfd with `body`, sealed against all changes."""
    memory = os.memfd_create("message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        written = 0
        while written < len(body):
            written += os.write(memory, body[written:])
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(memory)
        raise
    return memory


class BadMessage(ProtocolError):
    """A packet that `encode` does not make.

    Its `descriptors` are still open. Closing one that a hostile sender has attached may block
    (SO_LINGER of socket(7)), so the launcher leaves that to another process.
    """

    def __init__(self, why: str, descriptors: list[int]) -> None:
        super().__init__(f"cannot take the message: {why}")
        self.descriptors = descriptors


class DescriptorsLost(BadMessage):
    """A packet that lost descriptors: they were too many, or this process can open no more.

    `said` is its message, or None if the message travelled in a descriptor.
    """

    def __init__(self, said: Message | None, descriptors: list[int]) -> None:
        super().__init__("it is cut short: there is no room for its descriptors", descriptors)
        self.said = said


def decode(
    packet: bytes, ancillary: Sequence[tuple[int, int, bytes]], flags: int
) -> tuple[Message, list[int]]:
    """The message in a received packet and its descriptors, which the caller now owns.

    Raises BadMessage.
    """
    body, owned = unpack(packet, ancillary, flags)
    return _parse(body, owned), owned


def unpack(
    packet: bytes, ancillary: Sequence[tuple[int, int, bytes]], flags: int
) -> tuple[bytes, list[int]]:
    """As `decode`, of a body that may be anything: what `pack` was given."""
    owned = _descriptors(ancillary)
    if flags & socket.MSG_TRUNC:
        raise BadMessage("it is cut short", owned)
    if flags & socket.MSG_CTRUNC:
        inline = packet[:1] == _INLINE
        raise DescriptorsLost(_parse(packet[1:], owned) if inline else None, owned)
    if packet[:1] == _ATTACHED and owned:
        body = _read_sealed(owned)
        os.close(owned.pop(0))
    elif packet[:1] == _INLINE:
        body = packet[1:]
    else:
        raise BadMessage("its first byte is no known kind", owned)
    return body, owned


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return list(descriptors)


def _parse(body: bytes, owned: list[int]) -> Message:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise BadMessage("it is not JSON", owned) from None
    if not isinstance(message, dict):
        raise BadMessage("it is no JSON object", owned)
    return message


def _read_sealed(owned: list[int]) -> bytes:
    memory, body = owned[0], b""
    try:
        # Before the seals are known only fcntl(2) is safe: on a file system of the sender's own
        # (FUSE) other calls may block.
        seals = fcntl.fcntl(memory, fcntl.F_GET_SEALS)
        if seals & _SEALS == _SEALS and (size := os.fstat(memory).st_size) <= MAX_BODY_BYTES:
            while len(body) < size:
                body += os.pread(memory, size - len(body), len(body))
            return body
    except OSError:
        pass  # the descriptor has no seals, or the kernel has no memory for the body
    raise BadMessage("its body is no sealed memory of at most 4 MiB that can be read", owned)


def send(sock: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send one message with descriptors, which stay open here.

    Raises BlockingIOError if a non-blocking socket is full, and other OSErrors.
    """
    send_body(sock, body_of(message), descriptors)


def send_body(sock: socket.socket, body: bytes, descriptors: Sequence[int] = ()) -> None:
    """As `send`, for a body that is encoded already."""
    packet, ancillary, to_close = pack(body, descriptors)
    try:
        sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)
    finally:
        for descriptor in to_close:
            os.close(descriptor)


def receive(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """One message and its descriptors, which the caller owns; None at the end of the stream.

    Raises BadMessage and OSError.
    """
    packet, ancillary, flags, _ = sock.recvmsg(
        PACKET_BYTES, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
    )
    if not packet and not ancillary:
        return None
    return decode(packet, ancillary, flags)


def close_all(descriptors: Sequence[int]) -> None:
    """Close all of `descriptors`, even if closing one of them fails."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
