"""Builds the wall of a private network: a packet filter on the job's only way to its gateway.

    job ── its kernel's routes ── tap0 ──[ wall ]── slirp4netns ── the host's sockets

slirp4netns opens a socket of the host for any frame that it reads from its tap device. The kernel
runs the wall on each frame before slirp4netns can read it (TUNATTACHFILTER of tuntap.rst). So no
route, rule, socket option, family or source address leads around the wall. The filter belongs to
the descriptor that slirp4netns has open, not to the job's network. So even a job with all rights
over its network could not remove it. Rejected: Netfilter, traffic control and eBPF, which not every
kernel has and not every user may use.

The wall passes ARP. It passes TCP, UDP and ICMP over IPv4 without options, from the job's own
address to addresses outside of the host. In the gateway's network it passes packets to port 53 of
the resolver, but no fragments, since these have no port. It drops everything else.

When the host's addresses change, the launcher replaces the program by a new one in a single call
(`sandbox.network.modes`).

Standard library only.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator

from jobworker.sandbox import syscalls as sc

Range = tuple[int, int]
"""The first and the last address of a range of IPv4 addresses, as numbers."""

MAX_RANGES = 256
"""Keeps a program and its successor below net.core.optmem_max, 20 KiB on older kernels."""
_SEARCHED_DESCRIPTORS = 64
_NEVER_OUTSIDE = ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4")
"""This host, its loopback, multicast, and reserved addresses with the broadcast: RFC 6890."""

# <linux/bpf_common.h>: class, size, mode and jump in one code
_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_EQUAL, _GREATER, _AT_LEAST, _ANY_BIT, _RETURN = 0x15, 0x25, 0x35, 0x45, 0x06
_DROP, _PASS = 0, 0xFFFFFFFF
# Offsets into an Ethernet frame that holds an IPv4 packet: RFC 894, RFC 791.
_TYPE, _VERSION, _FRAGMENT, _PROTOCOL, _SOURCE, _DESTINATION = 12, 14, 20, 23, 26, 30
_DESTINATION_PORT = 36
_ARP, _IPV4 = 0x0806, 0x0800
_PLAIN_HEADER = 0x45
"""Version 4 and a header of five words: a packet without options, so without a source route."""
_IN_PARTS = 0x3FFF
"""The bits of a fragment: the flag "more fragments" and the offset."""


def number_of(address: str) -> int:
    """An IPv4 address as a number."""
    return int(struct.unpack("!I", socket.inet_aton(address))[0])


def range_of(network: str) -> Range:
    """The addresses of a network such as "10.0.2.0/24", or of one address without a length."""
    address, _, length = network.partition("/")
    behind = (1 << (32 - int(length or 32))) - 1
    first = number_of(address) & ~behind
    return first, first | behind


def merged(ranges: Iterable[Range], most: int = MAX_RANGES) -> tuple[Range, ...]:
    """All addresses of `ranges` in order, in at most `most` ranges.

    If there are more, the ranges with the smallest gaps between them are joined. So the result may
    close a few addresses too many, but never one too few.
    """
    found: list[Range] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    gaps = sorted(range(1, len(found)), key=lambda at: found[at][0] - found[at - 1][1])
    joined = set(gaps[: max(0, len(found) - most)])
    kept: list[Range] = []
    for at, (first, last) in enumerate(found):
        kept.append((kept.pop()[0], last) if at in joined else (first, last))
    return tuple(kept)


def program(own: str, resolver: str, network: str, of_the_host: Iterable[Range]) -> bytes:
    """The filter for the job with the address `own`, as an array of struct sock_filter.

    `network` is the gateway's network, and `of_the_host` has the addresses of the host.
    """
    closed = merged([*map(range_of, (*_NEVER_OUTSIDE, network)), *of_the_host])
    return b"".join((
        _load(_LOAD_HALF, _TYPE),
        *(_jump(_EQUAL, _ARP, no=1), _end(_PASS)),
        *_only(_IPV4),
        _load(_LOAD_BYTE, _VERSION),
        *_only(_PLAIN_HEADER),
        _load(_LOAD_WORD, _SOURCE),
        *_only(number_of(own)),
        _load(_LOAD_BYTE, _PROTOCOL),
        *_only(socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_ICMP),
        _load(_LOAD_WORD, _DESTINATION),
        *_resolver(number_of(resolver)),
        *(each for closed_range in closed for each in _none_of(closed_range)),
        _end(_PASS),
    ))  # fmt: skip


def build(gateway: int, program: bytes) -> None:
    """Attach `program` to the tap device that the process with the pidfd `gateway` has open.

    Raises OSError: ENODEV if the process has none, EPERM if no process may get the descriptors of
    another one (kernel.yama.ptrace_scope is 3).
    """
    for number in range(3, _SEARCHED_DESCRIPTORS):
        try:
            descriptor = sc.pidfd_getfd(gateway, number)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            continue
        try:
            if sc.is_tap(descriptor):
                sc.attach_tap_filter(descriptor, program)
                return
        finally:
            os.close(descriptor)
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


def _resolver(address: int) -> Iterator[bytes]:
    """Pass or drop a packet to the resolver; any other packet continues behind this part."""
    part = (
        _load(_LOAD_HALF, _FRAGMENT),
        *(_jump(_ANY_BIT, _IN_PARTS, no=1), _end(_DROP)),
        _load(_LOAD_BYTE, _PROTOCOL),
        *(_jump(_EQUAL, socket.IPPROTO_ICMP, no=1), _end(_DROP)),
        _load(_LOAD_HALF, _DESTINATION_PORT),
        *(_jump(_EQUAL, 53, no=1), _end(_PASS), _end(_DROP)),
    )
    yield _jump(_EQUAL, address, no=len(part))
    yield from part


def _none_of(closed: Range) -> Iterator[bytes]:
    first, last = closed
    if first == last:
        yield _jump(_EQUAL, first, no=1)
    else:
        yield _jump(_AT_LEAST, first, no=2)
        yield _jump(_GREATER, last, yes=1)
    yield _end(_DROP)


def _only(*values: int) -> Iterator[bytes]:
    """Drop the packet unless the value that was loaded last is one of `values`."""
    for left, value in zip(range(len(values), 0, -1), values, strict=True):
        yield _jump(_EQUAL, value, yes=left)
    yield _end(_DROP)


def _load(size: int, offset: int) -> bytes:
    return struct.pack("=HBBI", size, 0, 0, offset)


def _jump(condition: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", condition, yes, no, value)


def _end(verdict: int) -> bytes:
    return struct.pack("=HBBI", _RETURN, 0, 0, verdict)
