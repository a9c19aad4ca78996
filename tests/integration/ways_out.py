"""Every way that a socket can be told to take, tried from inside a job: its text is run there.

The arguments are a port, and addresses; "@ADDRESS" waits until a server there says something. Each
attempt sends or connects to each address and waits for nothing. What it sends is its name, so that
hosts can tell what has reached them. Standard output gets a line for each attempt, with what the
kernel answered. A gateway takes packets in turn, so the last wait tells that it has seen all.
"""

import collections
import contextlib
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial

TAP = "tap0"
IP, IP6 = socket.IPPROTO_IP, socket.IPPROTO_IPV6
BINDTODEVICE, BINDTOIFINDEX, MARK, DONTROUTE, BROADCAST = 25, 62, 36, 5, 6
IP_OPTIONS, IP_PKTINFO, IP_FREEBIND, IP_TRANSPARENT, IP_UNICAST_IF = 4, 8, 15, 19, 50
IP_MULTICAST_IF, IP_MTU_DISCOVER, IP_NODEFRAG = 32, 10, 22
IPV6_MULTICAST_IF, IPV6_PKTINFO, IPV6_UNICAST_IF, IPV6_FREEBIND = 17, 50, 76, 78
UDP_SEGMENT, UDPLITE, MPTCP = 103, 136, 262
OWN, GATEWAY, RESOLVER = "10.0.2.100", "10.0.2.2", "10.0.2.3"

Place = tuple[str, int]
Prepare = Callable[[socket.socket], object]


def index() -> int:
    """The tap's number; another device's where there is none, as on the host's network."""
    names = {name: number for number, name in socket.if_nameindex()}
    return names.get(TAP) or names.get("v0") or 1


def device() -> bytes:
    return socket.if_indextoname(index()).encode()


def source_route(kind: int, through: str, last: str) -> bytes:
    """A loose (0x83) or strict (0x89) source route: RFC 791."""
    hops = socket.inet_aton(through) + socket.inet_aton(last)
    return struct.pack("BBB", kind, 3 + len(hops), 4) + hops + b"\0"


def at(level: int, option: int, value: int | bytes) -> Prepare:
    return lambda sock: sock.setsockopt(level, option, value)


def all_of(*steps: Prepare) -> Prepare:
    return lambda sock: [step(sock) for step in steps]


def bound_to(address: str, *before: Prepare) -> Prepare:
    return all_of(*before, lambda sock: sock.bind((address, 0)))


def ways(place: str) -> Iterator[tuple[str, Prepare]]:
    """Preparations of a socket, by name."""
    bind = at(socket.SOL_SOCKET, BINDTODEVICE, device())
    free, network_order = at(IP, IP_FREEBIND, 1), struct.pack("!I", index())
    yield "plain", lambda _: None
    yield "device", bind
    yield "ifindex", at(socket.SOL_SOCKET, BINDTOIFINDEX, index())
    yield "mark", at(socket.SOL_SOCKET, MARK, 1)
    yield "dontroute", all_of(bind, at(socket.SOL_SOCKET, DONTROUTE, 1))
    yield "broadcast", all_of(bind, at(socket.SOL_SOCKET, BROADCAST, 1))
    yield "unicast-if", at(IP, IP_UNICAST_IF, network_order)
    yield "multicast-if", at(IP, IP_MULTICAST_IF, struct.pack("4s4si", b"", b"", index()))
    yield "transparent", at(IP, IP_TRANSPARENT, 1)
    yield "unicast-if-6", at(IP6, IPV6_UNICAST_IF, network_order)
    yield "multicast-if-6", at(IP6, IPV6_MULTICAST_IF, index())
    yield "freebind-6", at(IP6, IPV6_FREEBIND, 1)
    yield "no-discovery", all_of(bind, at(IP, IP_MTU_DISCOVER, 0))
    for source in (
        "127.0.0.1",
        "0.0.0.0",
        GATEWAY,
        RESOLVER,
        "10.0.2.77",
        "10.77.0.1",
        "192.0.2.9",
    ):
        yield f"from-{source}", bound_to(source, bind, free)
        yield f"mapped-from-{source}", bound_to(f"::ffff:{source}", bind, free)
    if ":" not in place:
        for kind in (0x83, 0x89):
            for through in (GATEWAY, RESOLVER, "10.77.0.2", place):
                yield (
                    f"route-{kind:x}-{through}",
                    all_of(bind, at(IP, IP_OPTIONS, source_route(kind, through, place))),
                )


def messages(place: str) -> Iterator[tuple[str, list[tuple[int, int, bytes]], int]]:
    """Ancillary data and flags of a datagram, by name."""
    yield "msg-dontroute", [], 4
    yield "msg-confirm", [], 0x800
    for source in ("0.0.0.0", "127.0.0.1", OWN, GATEWAY):
        packed = struct.pack("I4s4s", index(), socket.inet_aton(source), b"")
        yield f"pktinfo-{source}", [(IP, IP_PKTINFO, packed)], 0
        yield f"pktinfo-dontroute-{source}", [(IP, IP_PKTINFO, packed)], 4
    for source in ("::", "::1", f"::ffff:{OWN}", "::ffff:127.0.0.1"):
        packed = struct.pack("16sI", socket.inet_pton(socket.AF_INET6, source), index())
        yield f"pktinfo6-{source}", [(IP6, IPV6_PKTINFO, packed)], 0
    if ":" not in place:
        route = source_route(0x83, GATEWAY, place)
        yield "retopts", [(IP, 7, route)], 0


def spellings(address: str) -> Iterator[tuple[int, str]]:
    if ":" in address:
        yield socket.AF_INET6, address
    else:
        yield socket.AF_INET, address
        yield socket.AF_INET6, f"::ffff:{address}"


held: collections.deque[tuple[socket.socket, str]] = collections.deque()
"""Connections that may come about yet."""


def let_go() -> None:
    """Close the oldest connection, and name it to whom it has reached."""
    sock, name = held.popleft()
    with sock, contextlib.suppress(OSError):
        sock.send(name.encode())


def tell(name: str, to: str, attempt: Callable[[str], object]) -> None:
    try:
        attempt(f"{name} {to}")
    except (OSError, ValueError) as error:
        sys.stdout.write(f"{name} {to} {getattr(error, 'strerror', None) or error}\n")
    else:
        sys.stdout.write(f"{name} {to} sent\n")


def connect(protocol: int, family: int, prepare: Prepare, to: Place, name: str) -> None:
    sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    held.append((sock, name))
    if len(held) > 200:
        let_go()
    prepare(sock)
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect(to)


def send(protocol: int, family: int, prepare: Prepare, to: Place, name: str) -> None:
    """Twice: the first datagram may find the neighbour, for the second to reach it."""
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as sock:
        prepare(sock)
        for _ in range(2):
            sock.sendto(name.encode(), to)


def send_message(
    family: int, ancillary: list[tuple[int, int, bytes]], flags: int, to: Place, name: str
) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        for _ in range(2):
            sock.sendmsg([name.encode()], ancillary, flags, to)


def send_parts(to: Place, name: str) -> None:
    """A datagram in fragments, to the device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, BINDTODEVICE, device())
        sock.setsockopt(IP, IP_MTU_DISCOVER, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        for _ in range(2):
            sock.sendto(f"{name} ".encode() + bytes(65_450), to)


def send_segments(to: Place, name: str) -> None:
    """Datagrams that the kernel cuts from one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, BINDTODEVICE, device())
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 64)
        sock.sendto(f"{name} ".encode() + bytes(300), to)


def connect_early(to: Place, name: str) -> None:
    """A connection whose first packet has data: MSG_FASTOPEN."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.append((sock, name))
    sock.setsockopt(socket.SOL_SOCKET, BINDTODEVICE, device())
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.sendto(name.encode(), 0x20000000, to)


def ping(family: int, kind: int, prepare: Prepare, to: Place, name: str) -> None:
    """An echo request with the attempt's name: RFC 792, RFC 4443."""
    protocol, request = (1, 8) if family == socket.AF_INET else (58, 128)
    with socket.socket(family, kind, protocol) as sock:
        prepare(sock)
        echo = struct.pack("!BBHHH", request, 0, 0, 77, 1) + name.encode()
        echo += bytes(len(echo) % 2)
        total = sum(struct.unpack(f"!{len(echo) // 2}H", echo))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        echo = echo[:2] + struct.pack("!H", ~total & 0xFFFF) + echo[4:]
        for _ in range(2):
            sock.sendto(echo, (to[0], 0))


def try_all(address: str, port: int) -> None:
    """Everything at one address."""
    for family, spelt in spellings(address):
        to = (spelt, port)
        for name, prepare in ways(address):
            tell(f"udp {name}", spelt, partial(send, 0, family, prepare, to))
            tell(f"tcp {name}", spelt, partial(connect, 0, family, prepare, to))
            tell(f"ping {name}", spelt, partial(ping, family, socket.SOCK_DGRAM, prepare, to))
            tell(f"raw {name}", spelt, partial(ping, family, socket.SOCK_RAW, prepare, to))
        for name, ancillary, flags in messages(address):
            tell(f"message {name}", spelt, partial(send_message, family, ancillary, flags, to))
        bind = at(socket.SOL_SOCKET, BINDTODEVICE, device())
        tell("udplite", spelt, partial(send, UDPLITE, family, bind, to))
        tell("mptcp", spelt, partial(connect, MPTCP, family, bind, to))
    if ":" not in address:
        for name, attempt in (
            *(("parts", send_parts), ("segments", send_segments)),
            ("early", connect_early),
        ):
            tell(name, address, partial(attempt, (address, port)))


def wait_for(place: str) -> None:
    """Wait until a server says something."""
    address, _, port = place.partition("|")
    with socket.create_connection((address, int(port)), 60) as sock:
        sock.recv(64)


def main() -> None:
    """Try all, in the order given."""
    port, *addresses = sys.argv[1:]
    for address in addresses:
        if address.startswith("@"):
            sys.stdout.write("waiting\n")
            sys.stdout.flush()
            wait_for(address[1:])
        else:
            try_all(address, int(port))
    while held:
        let_go()


if __name__ == "__main__":
    main()
