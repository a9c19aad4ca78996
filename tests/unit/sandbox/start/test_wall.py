"""The wall of a private network: the kernel runs it on frames, as it does on those of a tap."""

import contextlib
import itertools
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.start.wall import MAX_RANGES, Range, merged, number_of, program, range_of

from ...strategies import examples

OWN, RESOLVER, NETWORK = "10.0.2.100", "10.0.2.3", "10.0.2.0/24"
OUTSIDE = "198.51.100.7"
HOST = ("192.0.2.2", "203.0.113.0/25", "10.77.0.255")
TCP, UDP, ICMP, IGMP, GRE = 6, 17, 1, 2, 47

addresses = st.integers(0, (1 << 32) - 1)
ranges = st.tuples(addresses, addresses).map(lambda pair: (min(pair), max(pair)))


def frame(
    to: str = OUTSIDE,
    protocol: int = UDP,
    port: int = 80,
    source: str = OWN,
    kind: int = 0x0800,
    first: int = 0x45,
    fragment: int = 0x4000,
) -> bytes:
    """An Ethernet frame with an IPv4 packet."""
    packet = struct.pack(
        "!BBHHHBBH4s4s",
        *(first, 0, 36, 1, fragment, 64, protocol, 0),
        *(socket.inet_aton(source), socket.inet_aton(to)),
    )
    options = bytes(max(0, 4 * (first & 15) - 20))
    ports = struct.pack("!HHHH", 40_000, port, 16, 0)
    return bytes(12) + struct.pack("!H", kind) + packet + options + ports + b"question"


class Wall:
    """A socket that a wall stands before: a filter sees the same of a message as of a frame."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far

    def passes(self, data: bytes) -> bool:
        with contextlib.suppress(PermissionError):  # unix(7) says so of a message that is dropped
            self.near.send(data)
        try:
            return self.far.recv(4096) == data
        except BlockingIOError:
            return False


@contextlib.contextmanager
def standing(of_the_host: tuple[Range, ...]) -> Iterator[Wall]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        far.setblocking(False)
        sc.attach_socket_filter(far.fileno(), program(OWN, RESOLVER, NETWORK, of_the_host))
        yield Wall(near, far)


@pytest.fixture
def wall() -> Iterator[Wall]:
    with standing(tuple(map(range_of, HOST))) as made:
        yield made


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_what_is_for_the_outside_passes_whole_and_in_fragments(wall: Wall, protocol: int) -> None:
    assert wall.passes(frame(protocol=protocol))
    for outside in ("1.0.0.0", "126.255.255.255", "128.0.0.0", "223.255.255.255", "203.0.113.128"):
        assert wall.passes(frame(outside, protocol))
    for fragment in (0x2000, 0x0001, 0x20B9):
        assert wall.passes(frame(protocol=protocol, fragment=fragment))
    assert wall.passes(frame(kind=0x0806)), "ARP"


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
@pytest.mark.parametrize(
    "to",
    [
        *("127.0.0.1", "127.255.255.255", "0.0.0.0", "0.0.0.1", "224.0.0.1", "239.255.255.255"),
        *("255.255.255.255", "240.0.0.1", "10.0.2.2", "10.0.2.0", "10.0.2.100", "10.0.2.255"),
        *("192.0.2.2", "203.0.113.0", "203.0.113.127", "10.77.0.255"),
    ],
)
def test_what_is_for_the_host_is_dropped(wall: Wall, to: str, protocol: int) -> None:
    for port in (53, 80):
        assert not wall.passes(frame(to, protocol, port))
        assert not wall.passes(frame(to, protocol, port, fragment=0x2000))
        assert not wall.passes(frame(to, protocol, port, fragment=0x0001))


def test_resolver_is_reached_at_its_port_alone_and_by_whole_packets(wall: Wall) -> None:
    assert wall.passes(frame(RESOLVER, UDP, 53))
    assert wall.passes(frame(RESOLVER, TCP, 53))
    assert wall.passes(frame(RESOLVER, UDP, 53, fragment=0))
    for dropped in (
        frame(RESOLVER, UDP, 54),
        frame(RESOLVER, TCP, 22),
        frame(RESOLVER, ICMP, 53),
        frame(RESOLVER, UDP, 53, fragment=0x2000),
        frame(RESOLVER, UDP, 53, fragment=0x0001),
        frame(RESOLVER, UDP, 53, first=0x46),
    ):
        assert not wall.passes(dropped)


def test_what_is_no_plain_packet_of_the_jobs_own_is_dropped(wall: Wall) -> None:
    for source in ("127.0.0.1", "0.0.0.0", "10.0.2.2", "192.0.2.2", OUTSIDE):
        assert not wall.passes(frame(source=source))
    for first in (0x44, 0x46, 0x4F, 0x55, 0x65):
        assert not wall.passes(frame(first=first)), "options, or another version"
    for kind in (0x86DD, 0x8100, 0x88A8, 0x8863, 0x0000):
        assert not wall.passes(frame(kind=kind)), "IPv6, a VLAN, PPPoE"
    for protocol in (0, IGMP, 4, 41, GRE, 132, 136, 255):
        assert not wall.passes(frame(protocol=protocol))
    for length in range(34):
        assert not wall.passes(frame()[:length]), "cut short"


@given(st.lists(ranges, max_size=300), st.data())
@examples(max_examples=60)
def test_every_address_of_a_range_is_dropped_and_no_other(
    closed: list[Range], data: st.DataObject
) -> None:
    with standing(tuple(closed)) as wall:
        wanted = merged([*closed, *map(range_of, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3"))])
        edges = [edge + step for each in closed for edge in each for step in (-1, 0, 1)]
        tried = data.draw(st.lists(st.sampled_from(edges) if edges else addresses, max_size=20))
        for number in tried:
            if not 0 <= number < 1 << 32 or number >> 8 == number_of("10.0.2.0") >> 8:
                continue
            inside = any(first <= number <= last for first, last in wanted)
            to = socket.inet_ntoa(struct.pack("!I", number))
            assert wall.passes(frame(to)) is not inside or len(wanted) >= MAX_RANGES - 1


@given(st.lists(ranges, max_size=40), st.integers(1, 12))
@examples()
def test_merged_ranges_are_few_in_order_and_lose_no_address(ours: list[Range], most: int) -> None:
    found = merged(ours, most)
    assert len(found) <= max(1, most)
    assert list(found) == sorted(found)
    assert all(one[1] + 1 < two[0] for one, two in itertools.pairwise(found))
    for first, last in ours:
        assert any(one <= first and last <= two for one, two in found)


def test_a_host_of_many_addresses_has_a_wall_that_a_kernel_takes_in_place_of_another() -> None:
    many = tuple(range_of(f"10.{number >> 8}.{number & 255}.9") for number in range(5000))
    with standing(many) as wall:
        assert len(program(OWN, RESOLVER, NETWORK, many)) // 8 < 900
        sc.attach_socket_filter(wall.far.fileno(), program(OWN, RESOLVER, NETWORK, many[1:]))
        for first, _ in many[1::97]:
            assert not wall.passes(frame(socket.inet_ntoa(struct.pack("!I", first))))
        assert wall.passes(frame())
