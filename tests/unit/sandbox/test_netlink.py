"""What the kernel answers over netlink is taken as a whole, or refused."""

import errno
import socket
import struct
from collections.abc import Iterator

import pytest

from jobworker.sandbox import netlink

ROW, DONE, ERROR, OVERRUN = 20, 3, 2, 4
MULTI, INTERRUPTED = 0x2, 0x10


class Kernel:
    """A netlink socket whose answers the test has written, one packet for each call."""

    def __init__(self, packets: Iterator[bytes]) -> None:
        self._packets = packets

    def __enter__(self) -> "Kernel":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def setsockopt(self, *_: int) -> None:
        pass

    def sendto(self, *_: object) -> None:
        pass

    def recvmsg(self, most: int) -> tuple[bytes, list[object], int, None]:
        packet = next(self._packets)
        return packet[:most], [], socket.MSG_TRUNC if len(packet) > most else 0, None


def message(kind: int, content: bytes = b"row!", flags: int = MULTI) -> bytes:
    body = struct.pack("=IHHII", 16 + len(content), kind, flags, 1, 0) + content
    return body + bytes(-len(body) % 4)


def code(number: int) -> bytes:
    return struct.pack("=i", number)


END = message(DONE, code(0))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The packets that the kernel sends, of all sockets one after the other."""
    packets: list[bytes] = []
    left = iter(packets)
    monkeypatch.setattr(netlink, "_open", lambda _protocol=0: Kernel(left))
    return packets


def rows() -> list[bytes]:
    return list(netlink.dump(ROW, b""))


def test_dump_has_the_messages_of_all_packets(answers: list[bytes]) -> None:
    answers += [message(ROW) + message(ROW, b"odd"), message(ROW, b"last"), END]
    assert rows() == [b"row!", b"odd", b"last"]


@pytest.mark.parametrize(
    ("packets", "expected"),
    [
        ([message(ERROR, code(-errno.EPERM))], errno.EPERM),
        ([message(ROW), message(ERROR, code(-errno.ENOMEM))], errno.ENOMEM),
        ([message(ROW) + message(DONE, code(-errno.EMSGSIZE))], errno.EMSGSIZE),
        ([message(ROW), message(OVERRUN)], errno.ENOBUFS),
        ([message(ROW, flags=MULTI | INTERRUPTED), message(ROW), END], errno.EINTR),
        ([message(ROW), message(DONE, code(0), MULTI | INTERRUPTED)], errno.EINTR),
        ([message(ROW) + bytes(netlink._PACKET_BYTES)], errno.EMSGSIZE),
        ([message(ROW)[:-1]], errno.EBADMSG),
        ([message(ROW) + message(ROW)[:15]], errno.EBADMSG),
        ([struct.pack("=IHHII", 0, ROW, MULTI, 1, 0)], errno.EBADMSG),
        ([struct.pack("=IHHII", 15, ROW, MULTI, 1, 0)], errno.EBADMSG),
    ],
    ids=[
        "refused",
        "error half way",
        "error at the end",
        "overrun",
        "changed",
        "changed before the end",
        "packet cut",
        "message cut",
        "header cut",
        "no length",
        "length below a header",
    ],
)
def test_dump_that_is_not_whole_is_an_error(
    answers: list[bytes], packets: list[bytes], expected: int
) -> None:
    answers += packets
    with pytest.raises(OSError, match="over netlink") as caught:
        rows()
    assert caught.value.errno == expected


def test_acknowledgement_ends_a_dump(answers: list[bytes]) -> None:
    answers += [message(ROW), message(ERROR, code(0))]
    assert rows() == [b"row!"]


def address(number: int) -> bytes:
    attribute = struct.pack("HH", 8, 2) + bytes([10, 0, 0, number])
    return struct.pack("BBBBi", socket.AF_INET, 24, 0, 0, 1) + attribute


def test_addresses_are_read_anew_where_they_change_meanwhile(answers: list[bytes]) -> None:
    answers += [message(ROW, address(1), MULTI | INTERRUPTED), END]
    answers += [message(ROW, address(1)) + message(ROW, address(2)), END]
    assert netlink.addresses() == [("10.0.0.1", 24), ("10.0.0.2", 24)]


def test_addresses_that_never_rest_are_an_error(answers: list[bytes]) -> None:
    answers += [message(ROW, address(1), MULTI | INTERRUPTED), END] * netlink._TRIES
    with pytest.raises(InterruptedError):
        netlink.addresses()


def test_kernel_tells_addresses_and_local_networks() -> None:
    assert ("127.0.0.1", 8) in netlink.addresses()
    assert ("127.0.0.0", 8) in netlink.local_networks()


def test_kernel_refuses_a_list_of_what_it_does_not_have() -> None:
    body = struct.pack("=BBBxI48x", 255, socket.IPPROTO_TCP, 0, 0xFFE)
    with pytest.raises(OSError, match="over netlink"):
        list(netlink.dump(netlink.SOCKETS, body, protocol=netlink.SOCK_DIAG))
