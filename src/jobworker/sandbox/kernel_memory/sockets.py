"""The sockets over IP of a network, and the memory that each holds, by the kernel's lists.

sock_diag(7) lists the TCP and UDP sockets of this process's network. A file of /proc lists ping
sockets (icmp(7)). Data in a socket's error queue (time stamps, IP_RECVERR) counts as received, and
a datagram that MSG_MORE keeps open counts as sent.

A list has the sockets that the kernel can find by their port. A socket that is no longer bound is
in no list, and keeps its data: a UDP socket after a connect(2) to AF_UNSPEC, and a TCP socket that
its peer has reset. `held_by` reads the memory of such a socket by one of its descriptors.

Standard library only. Sources: sock_diag(7), linux/inet_diag.h, net/ipv4/inet_diag.c, ping.c,
include/uapi/linux/sock_diag.h, socket(7).
"""

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from jobworker.sandbox import netlink
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.log import log_line

ESTABLISHED, CLOSE_WAIT, LISTEN = 1, 8, 10
_SYN_RECEIVED, _TIME_WAIT = 3, 6
_STATES = 0xFFE & ~(1 << _SYN_RECEIVED | 1 << _TIME_WAIT)
"""The states of sockets that have buffers."""
_MEMORY, _ONLY_IPV6 = 7, 11
"""INET_DIAG_SKMEMINFO, INET_DIAG_SKV6ONLY."""
_ROW = struct.Struct("=BBxx2s2x16s16xI12xI4xII")
"""struct inet_diag_msg: family, state, port, address, device, queue, user, inode."""
_ATTRIBUTE, _SIZES = struct.Struct("=HH"), struct.Struct("=4Ii3I")
"""Received, its bound, sent, its bound, ahead, queued, options, backlog; then drops."""
_MEMINFO = 55  # SO_MEMINFO
_FAMILIES = {socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK}


class Socket(NamedTuple):
    """A socket of TCP or UDP."""

    family: int
    state: int
    port: bytes
    address: bytes
    device: int
    """The index of the network device that it is bound to, or 0."""
    queue: int
    """How many connections wait in it, if it listens."""
    uid: int
    inode: int
    """0 if it has no descriptor: it is not accepted yet, or closed."""
    memory_bytes: int
    only_ipv6: bool = False
    """Whether it listens on IPv6 alone, and not on IPv4 as well."""


def sockets(protocol: int) -> Iterator[Socket]:
    """The sockets of IPPROTO_TCP or IPPROTO_UDP in this process's network.

    Raises OSError, and FileNotFoundError if this kernel cannot list them.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        wanted = 1 << (_MEMORY - 1)
        body = struct.pack("=BBBxI48x", family, protocol, wanted, _STATES)
        for row in netlink.dump(netlink.SOCKETS, body, protocol=netlink.SOCK_DIAG):
            _, state, port, address, device, queue, uid, inode = _ROW.unpack_from(row)
            memory_bytes, only_ipv6 = 0, False
            at = _ROW.size
            while at < len(row):
                length, kind = _ATTRIBUTE.unpack_from(row, at)
                if kind == _MEMORY:
                    memory_bytes = _held(row, at + 4, protocol)
                elif kind == _ONLY_IPV6:
                    only_ipv6 = bool(row[at + 4])
                at += (length + 3) & ~3
            yield Socket(
                family, state, port, address, device, queue, uid, inode, memory_bytes, only_ipv6
            )


def tell_what_cannot_be_listed() -> None:
    """Log the protocols whose sockets this kernel cannot list, since their memory has no bound."""
    for name, protocol in (("TCP", socket.IPPROTO_TCP), ("UDP", socket.IPPROTO_UDP)):
        try:
            next(sockets(protocol), None)
        except OSError as error:
            log_line(
                f"cannot list sockets of {name}: {error}; what they hold uncounted is not bounded"
            )


def ping_sockets(place: str) -> Iterator[tuple[int, int]]:
    """The user id and the bytes of each ping socket in a process's network.

    `place` is a directory of /proc from `kernel_memory.measure.places_of`. Raises OSError.
    """
    for name in ("icmp", "icmp6"):
        with contextlib.suppress(FileNotFoundError), open(f"{place}/net/{name}") as file:
            next(file)
            for row in map(str.split, file):
                sent, _, received = row[4].partition(":")
                yield int(row[7]), int(sent, 16) + int(received, 16)


def held_by(descriptor: int) -> int:
    """How many bytes a socket over IP or netlink holds, listed or not; 0 for another kind.

    These socket options do not wait for the socket's lock. Raises OSError.
    """
    family, protocol = (
        _number(descriptor, name) for name in (socket.SO_DOMAIN, socket.SO_PROTOCOL)
    )
    if family not in _FAMILIES:
        return 0
    return _held(sc.getsockopt(descriptor, socket.SOL_SOCKET, _MEMINFO, 36), 0, protocol)


def _number(descriptor: int, option: int) -> int:
    (value,) = struct.unpack("i", sc.getsockopt(descriptor, socket.SOL_SOCKET, option, 4))
    return int(value)


def _held(sizes: bytes, at: int, protocol: int) -> int:
    """The bytes that a socket holds: TCP sends copies of its queue, other protocols have none."""
    received, _, sent, _, ahead, queued, options, backlog = _SIZES.unpack_from(sizes, at)
    outgoing = queued if protocol == socket.IPPROTO_TCP else sent
    return int(received + outgoing + max(ahead, 0) + options + backlog)
