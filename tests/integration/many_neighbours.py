"""Makes new neighbours in the kernel's tables by every way of a socket: its text is run in a job.

The argument is a way. Standard output gets "flooding" once many neighbours were asked for, and at
SIGTERM, or after some seconds, the kernel's answers with the number of each.
"""

import collections
import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Address = tuple[str, int] | tuple[str, int, int, int]
Attempt = Callable[[], object]

TAP = "tap0"
IP = socket.IPPROTO_IP
BINDTODEVICE, DONTROUTE, MSG_DONTROUTE, IP_OPTIONS, IP_RETOPTS = 25, 5, 4, 4, 7
BEFORE_TOLD, SOCKETS, SECONDS = 3_000, 200, 10.0


def strict_route(first: str, last: str) -> bytes:
    """A strict source route, whose first hop the kernel takes to be a neighbour: RFC 791."""
    hops = socket.inet_aton(first) + socket.inet_aton(last)
    return struct.pack("BBB", 0x89, 3 + len(hops), 4) + hops + b"\0"


def anywhere() -> str:
    return f"198.18.{random.randrange(256)}.{random.randrange(1, 255)}"


def nearby(prefix: str) -> str:
    return f"{prefix}:{random.randrange(1, 65_536):x}:{random.randrange(1, 65_536):x}"


def opened(family: int, kind: int, *, near: bool, device: str = TAP) -> socket.socket:
    """A socket of a device, for which every address is a neighbour's if `near`."""
    sock = socket.socket(family, kind)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, BINDTODEVICE, device.encode())
    sock.setsockopt(socket.SOL_SOCKET, DONTROUTE, near)
    return sock


def datagrams(
    family: int, address: Callable[[], Address], *, flags: int = 0, device: str = TAP
) -> Iterator[Attempt]:
    """Many sockets, as each has room for few packets that wait for a neighbour."""
    kind, near = socket.SOCK_DGRAM, not flags
    socks = [opened(family, kind, near=near, device=device) for _ in range(SOCKETS)]
    while True:
        for sock in socks:
            yield lambda sock=sock: sock.sendto(b"x", flags, address())  # type: ignore[misc]


def routed(*, by_message: bool) -> Iterator[Attempt]:
    """Strict source routes, each over another first hop."""
    socks = [opened(socket.AF_INET, socket.SOCK_DGRAM, near=False) for _ in range(SOCKETS)]

    def attempt(sock: socket.socket) -> None:
        options = strict_route(anywhere(), "198.19.0.1")
        if by_message:
            sock.sendmsg([b"x"], [(IP, IP_RETOPTS, options)], 0, ("198.19.0.1", 9))
        else:
            sock.setsockopt(IP, IP_OPTIONS, options)
            sock.sendto(b"x", ("198.19.0.1", 9))

    while True:
        for sock in socks:
            yield lambda sock=sock: attempt(sock)  # type: ignore[misc]


def connected(family: int, kind: int, address: Callable[[], Address]) -> Iterator[Attempt]:
    """Sockets that keep their route: hundreds."""
    kept: collections.deque[socket.socket] = collections.deque(maxlen=400)

    def attempt() -> None:
        kept.append(sock := opened(family, kind, near=True))
        try:
            sock.connect(address())
            sock.send(b"x")
        except BlockingIOError:
            pass

    while True:
        yield attempt


def in_turn(*ways: Iterator[Attempt]) -> Iterator[Attempt]:
    """One of each."""
    for attempts in zip(*ways, strict=True):
        yield from attempts


def ways() -> dict[str, Iterator[Attempt]]:
    """All ways by name. None of them does anything before it is iterated."""
    tap = socket.if_nametoindex(TAP)
    four, six, udp = socket.AF_INET, socket.AF_INET6, socket.SOCK_DGRAM

    def any_4() -> Address:
        return anywhere(), 9

    def group_4() -> Address:
        return f"239.{random.randrange(256)}.{random.randrange(256)}.1", 9

    def mapped() -> Address:
        return f"::ffff:{anywhere()}", 9, 0, 0

    def link_6() -> Address:
        return nearby("fe80:"), 9, 0, tap

    def any_6() -> Address:
        return nearby("fd66:"), 9, 0, tap

    def group_6() -> Address:
        return nearby("ff12:"), 9, 0, tap

    return {
        "datagrams": in_turn(
            datagrams(four, any_4),
            datagrams(four, any_4, flags=MSG_DONTROUTE),
            datagrams(six, mapped),
        ),
        "source-routes": in_turn(routed(by_message=False), routed(by_message=True)),
        "connections": in_turn(
            connected(four, udp, any_4), connected(four, socket.SOCK_STREAM, any_4)
        ),
        "groups": datagrams(four, group_4),
        "loopback": in_turn(
            datagrams(four, any_4, device="lo"),
            datagrams(four, group_4, device="lo"),
            datagrams(six, lambda: (nearby("fe80:"), 9, 0, 1), device="lo"),
            datagrams(six, lambda: (nearby("ff12:"), 9, 0, 1), device="lo"),
        ),
        "datagrams-6": in_turn(datagrams(six, link_6), datagrams(six, any_6)),
        "connections-6": in_turn(
            connected(six, udp, link_6), connected(six, socket.SOCK_STREAM, link_6)
        ),
        "groups-6": datagrams(six, group_6),
    }


def wait_for_address() -> None:
    """Wait until IPv6 of the device may be used, if it has any: IFA_F_TENTATIVE."""
    table = Path("/proc/net/if_inet6")
    while any(
        words[5] == TAP and int(words[4], 16) & 0x40
        for words in map(str.split, table.read_text().splitlines())
    ):
        time.sleep(0.01)


def main() -> None:
    """Flood until told to end."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    answers: collections.Counter[str] = collections.Counter()
    attempts = ways()[sys.argv[1]]
    if sys.argv[1].endswith("-6"):
        wait_for_address()
    end = time.monotonic() + SECONDS
    number = 0
    while not told and time.monotonic() < end:
        number += 1
        try:
            next(attempts)()
        except OSError as error:
            answers[os.strerror(error.errno or 0)] += 1
        else:
            answers["sent"] += 1
        if number == BEFORE_TOLD:
            os.write(1, b"flooding\n")
    os.write(1, f"{dict(answers)}\n".encode())


if __name__ == "__main__":
    main()
