"""The channel: messages and descriptors arrive whole, and forgeries are refused untouched."""

import array
import errno
import fcntl
import json
import os
import resource
import socket
import tempfile
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.errors import ProtocolError
from jobworker.sandbox import channel
from jobworker.sandbox.channel import Message

from ...descriptors import descriptors
from ..strategies import examples, texts

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
messages: st.SearchStrategy[Message] = st.dictionaries(texts, values, max_size=4)


def open_descriptors() -> set[str]:
    return {
        f"{name} {os.readlink(f'/proc/self/fd/{name}')}"
        for name in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{name}")
    }


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(False)
    far.setblocking(False)
    with near, far:
        yield near, far


# --- messages of ours -----------------------------------------------------------------------


@examples(max_examples=100)
@given(messages, st.integers(0, channel.MAX_DESCRIPTORS - 1))
def test_message_and_descriptors_arrive_as_they_were_sent(message: Message, count: int) -> None:
    before = open_descriptors()
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        sent = [os.memfd_create(f"{number}", os.MFD_CLOEXEC) for number in range(count)]
        channel.send(near, message, sent)
        received = channel.receive(far)
        assert received is not None
        body, came = received
        assert body == message
        assert len(came) == count
        for ours, theirs in zip(sent, came, strict=True):
            assert os.path.sameopenfile(ours, theirs)
            assert not os.get_inheritable(theirs)
        channel.close_all([*sent, *came])
    assert open_descriptors() == before


@pytest.mark.parametrize(
    "size", [0, 1, 32 << 10, (32 << 10) + 1, 100_000, channel.MAX_BODY_BYTES - 8]
)
def test_body_of_any_size_arrives_whole(
    pair: tuple[socket.socket, socket.socket], size: int
) -> None:
    near, far = pair
    before = open_descriptors()
    passed = os.open("/dev/null", os.O_RDONLY)
    message: Message = {"t": "x" * size}
    channel.send(near, message, [passed])
    received = channel.receive(far)
    assert received is not None
    body, (came,) = received
    assert body == message
    assert os.path.sameopenfile(passed, came)
    channel.close_all([passed, came])
    assert open_descriptors() == before


@pytest.mark.parametrize("size", [10, 100_000])
def test_descriptors_that_find_no_room_are_told_apart_from_a_forgery(size: int) -> None:
    before = open_descriptors()
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        passed = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
        channel.send(near, {"id": 7, "t": "x" * size}, passed)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = {int(name) for name in os.listdir("/proc/self/fd")}
        lowest = next(number for number in range(len(taken) + 2) if number not in taken)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            with pytest.raises(channel.DescriptorsLost) as lost:
                channel.receive(far)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        said = lost.value.said
        assert (said is None) if size > channel.MAX_INLINE_BYTES else (said or {})["id"] == 7
        channel.close_all([*passed, *lost.value.descriptors])
    assert open_descriptors() == before


@pytest.mark.parametrize("extra", [0, 1])
def test_body_travels_beside_the_packet_once_it_exceeds_it(extra: int) -> None:
    size = channel.MAX_INLINE_BYTES - len('{"t":""}') + extra
    packet, ancillary, mine = channel.encode({"t": "x" * size}, ())
    assert len(packet) == (1 if extra else channel.PACKET_BYTES)
    assert len(mine) == len(ancillary) == extra
    for memory in mine:
        assert fcntl.fcntl(memory, fcntl.F_GET_SEALS) & SEALS == SEALS
        assert os.fstat(memory).st_size == channel.MAX_INLINE_BYTES + 1
        os.close(memory)


def test_body_beyond_the_bound_is_not_sent() -> None:
    before = open_descriptors()
    with pytest.raises(ProtocolError, match="the bound is 4 MiB"):
        channel.encode({"t": "x" * channel.MAX_BODY_BYTES}, ())
    assert open_descriptors() == before


def test_messages_keep_their_borders(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    for number in range(20):
        channel.send(near, {"n": number, "pad": "x" * (number * 4000)})
    for number in range(20):
        received = channel.receive(far)
        assert received is not None
        assert received[0]["n"] == number


def test_end_of_the_stream_is_none(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    channel.send(near, {})
    near.close()
    assert channel.receive(far) == ({}, [])
    assert channel.receive(far) is None


def send_for_ever(sock: socket.socket, message: Message) -> None:
    while True:
        channel.send(sock, message)


def test_full_socket_raises_and_leaves_nothing_open(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, _ = pair
    before = open_descriptors()
    for size in (40_000, 30_000):
        with pytest.raises(BlockingIOError):
            send_for_ever(near, {"t": "x" * size})
    assert open_descriptors() == before


# --- forgeries ------------------------------------------------------------------------------


def memory(content: bytes, seals: int) -> int:
    descriptor = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, content)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _pipe() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def _file() -> int:
    descriptor, path = tempfile.mkstemp()
    os.write(descriptor, b"{}")
    os.unlink(path)
    return descriptor


def _socket() -> int:
    return socket.socket(socket.AF_UNIX).detach()


def _oversize() -> int:
    descriptor = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, channel.MAX_BODY_BYTES + 1)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor


NO_BODIES: dict[str, Callable[[], int]] = {
    "memory that is not sealed": lambda: memory(b"{}", 0),
    "memory that may grow": lambda: memory(b"{}", fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK),
    "memory that may shrink": lambda: memory(b"{}", fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW),
    "memory that may be written": lambda: memory(b"{}", fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW),
    "sealed memory beyond the bound": _oversize,
    "empty sealed memory": lambda: memory(b"", SEALS),
    "sealed memory that is no JSON": lambda: memory(b"{", SEALS),
    "sealed memory that is no object": lambda: memory(b"[]", SEALS),
    "pipe": _pipe,
    "file": _file,
    "socket": _socket,
    "directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
    "path": lambda: os.open("/", os.O_PATH),
    "device": lambda: os.open("/dev/zero", os.O_RDONLY),
}


SEALED = {name for name in NO_BODIES if name.startswith(("empty sealed", "sealed memory that"))}
"""What may be read, and so is closed by the reader, but holds no message."""


def forge(sock: socket.socket, packet: bytes, descriptors: list[int]) -> None:
    rights = array.array("i", descriptors).tobytes()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
    sock.sendmsg([packet], ancillary)
    channel.close_all(descriptors)


def close_those_left(before: set[str]) -> int:
    """How many descriptors have come since `before`; they are closed.

    The channel leaves those of a refused message alone: close(2) itself may block, where the
    sender has asked for that by SO_LINGER.
    """
    left = [int(each.split()[0]) for each in open_descriptors() - before]
    assert not any(os.get_inheritable(descriptor) for descriptor in left)
    channel.close_all(left)
    return len(left)


@pytest.mark.parametrize("body", NO_BODIES)
def test_descriptor_that_is_no_sealed_body_is_refused(
    pair: tuple[socket.socket, socket.socket], body: str
) -> None:
    near, far = pair
    before = open_descriptors()
    forge(near, b"a", [NO_BODIES[body](), _pipe(), _socket()])
    with pytest.raises(ProtocolError):
        channel.receive(far)
    assert close_those_left(before) == (2 if body in SEALED else 3)


def test_memory_that_is_not_sealed_is_not_read(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    before = open_descriptors()
    forge(near, b"a", [memory(b'{"a":1}', fcntl.F_SEAL_SHRINK)])
    with pytest.raises(ProtocolError, match="no sealed memory"):
        channel.receive(far)
    forge(near, b"a", [memory(b'{"a":1}', SEALS)])
    assert channel.receive(far) == ({"a": 1}, [])
    assert close_those_left(before) == 1


@pytest.mark.parametrize(
    "packet",
    [
        *(b"", b"x{}", b"i", b"i{", b"i[]", b"i1", b'i"x"', b"inull", b"i\xff", b"{}", b"I{}"),
        *(b"i{}{}", b"i" + b"[" * 30_000, b'i{"a":' + b"9" * 5000 + b"}", b"\0"),
    ],
    ids=lambda packet: repr(packet[:12]),
)
def test_forged_packet_is_refused(pair: tuple[socket.socket, socket.socket], packet: bytes) -> None:
    near, far = pair
    before = open_descriptors()
    forge(near, packet, [_pipe(), _file()])
    with pytest.raises(ProtocolError):
        channel.receive(far)
    assert close_those_left(before) == 2


def test_attached_body_without_a_descriptor_is_refused(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    forge(near, b"a", [])
    with pytest.raises(ProtocolError, match="its first byte is no known kind"):
        channel.receive(far)


def test_packet_beyond_the_bound_is_refused_as_cut_short(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    before = open_descriptors()
    forge(near, b"i{}" + b" " * channel.PACKET_BYTES, [_pipe()])
    with pytest.raises(ProtocolError, match="cut short"):
        channel.receive(far)
    assert close_those_left(before) == 1


def test_more_descriptors_than_the_bound_are_refused_and_cut_off(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    before = open_descriptors()
    forge(near, b"i{}", [_pipe() for _ in range(channel.MAX_DESCRIPTORS + 40)])
    with pytest.raises(ProtocolError, match="cut short"):
        channel.receive(far)
    assert close_those_left(before) == channel.MAX_DESCRIPTORS


def test_refused_packet_does_not_spoil_the_next(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    forge(near, b"x", [])
    channel.send(near, {"a": 1})
    with pytest.raises(ProtocolError):
        channel.receive(far)
    assert channel.receive(far) == ({"a": 1}, [])


@examples(max_examples=300)
@given(
    st.binary(max_size=60)
    | st.binary(max_size=60).map(lambda body: b"i" + body)
    | values.map(lambda value: b"i" + json.dumps(value).encode())
)
def test_any_packet_is_a_message_or_refused(packet: bytes) -> None:
    descriptor = os.open("/dev/null", os.O_RDONLY)
    rights = array.array("i", [descriptor]).tobytes()
    try:
        message, owned = channel.decode(
            packet, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], flags=0
        )
    except ProtocolError:
        return
    finally:
        os.close(descriptor)  # it is open still, whatever the packet held
    assert isinstance(message, dict)
    assert owned == [descriptor]


def test_closing_goes_on_after_a_descriptor_that_is_closed_already() -> None:
    first, second = os.pipe()
    os.close(first)
    channel.close_all([first, second])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second)


def test_body_that_cannot_be_read_is_refused_with_its_descriptors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: int) -> bytes:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    packet, ancillary, mine = channel.encode({"text": "x" * (2 * channel.MAX_INLINE_BYTES)}, ())
    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(channel.BadMessage) as refused:
        channel.decode(packet, ancillary, 0)
    assert refused.value.descriptors == mine
    channel.close_all(mine)


def test_body_that_cannot_be_stored_leaves_nothing_open() -> None:
    """Here by RLIMIT_FSIZE; it may be the memory of a control group as well."""
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            channel.encode({"body": "x" * (1 << 20)}, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert descriptors() == before
