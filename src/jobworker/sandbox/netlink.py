"""Sends the netlink requests that jobs' networks need: rtnetlink(7), sock_diag(7).

A message is a header (length, kind, flags, sequence, port), a fixed body and attributes (length,
kind, value, padded to four bytes). The kernel answers a request with an error number, 0 for
success. It answers a dump with messages, of which the last has a kind of its own. Addresses are
IPv4 only, as text.

A dump that fails half way looks like a short one. A caller that took it for complete would leave
addresses open or memory uncounted. So each sign of an incomplete dump raises OSError: an error
instead of messages or in the last one, a lost or truncated message, and a list that has changed
while it was read.

Standard library only.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator

from jobworker.sandbox import syscalls as sc

_ERROR, _DONE, _OVERRUN = 2, 3, 4
_INTERRUPTED = 0x10
"""NLM_F_DUMP_INTR: the list has changed while it was read, so the dump may lack older entries."""
_TRIES = 10
_HEADER, _CODE = struct.Struct("=IHHII"), struct.Struct("=i")
_PACKET_BYTES = 65_536
_NEW_ADDRESS, _GET_ADDRESS, _NEW_ROUTE, _NEW_RULE = 20, 22, 24, 32
_REQUEST, _ACKNOWLEDGE, _REPLACE, _DUMP, _CREATE = 0x1, 0x4, 0x100, 0x300, 0x400
SOCK_DIAG, SOCKETS = 4, 20
"""A netlink protocol and its request SOCK_DIAG_BY_FAMILY: sock_diag(7)."""
_MAIN_TABLE = 254
_LOCAL_ADDRESS, _DESTINATION, _PRIORITY, _PROTOCOL, _PORTS = 2, 1, 6, 22, 24
_ROUTE_UNREACHABLE, _RULE_LOOKUP, _RULE_UNREACHABLE = 7, 1, 7
_GET_ROUTE, _LOCAL_TABLE = 26, 255
_NEW_NEIGHBOUR, _SET_NEIGHBOUR_TABLE = 28, 67
_NEIGHBOUR, _HARDWARE_ADDRESS, _PERMANENT, _USE = 1, 2, 0x80, 0x01
_TABLE, _PARAMETERS, _INTERFACE, _PROBES_BY_PROGRAM, _PROBES = 1, 6, 1, 9, 11
_NETLINK, _STRICT = 270, 12  # SOL_NETLINK, NETLINK_GET_STRICT_CHK
_IPV4_ADDRESSES, _IPV4_ROUTES = 0x10, 0x40  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE


def addresses() -> list[tuple[str, int]]:
    """The IPv4 addresses of this network namespace, each with the length of its prefix."""
    body = struct.pack("BBBBi", socket.AF_INET, 0, 0, 0, 0)
    found = []
    for message in _whole(_GET_ADDRESS, body):
        family, prefix = message[0], message[1]
        local = dict(_attributes(message[8:])).get(_LOCAL_ADDRESS)
        if family == socket.AF_INET and local is not None:
            found.append((socket.inet_ntoa(local), prefix))
    return found


def local_networks() -> list[tuple[str, int]]:
    """The IPv4 networks that this network namespace delivers to itself, with prefix lengths.

    They are its addresses, its broadcast addresses, and local routes that an administrator has
    added.
    """
    body = struct.pack("BBBBBBBBI", socket.AF_INET, 0, 0, 0, _LOCAL_TABLE, 0, 0, 0, 0)
    found = []
    for message in _whole(_GET_ROUTE, body, strict=True):
        if message[0] == socket.AF_INET and message[4] == _LOCAL_TABLE:
            destination = dict(_attributes(message[12:])).get(_DESTINATION, bytes(4))
            found.append((socket.inet_ntoa(destination), message[1]))
    return found


class AddressMonitor:
    """Reports that addresses or local routes of this network namespace have changed."""

    def __init__(self) -> None:
        self._kernel = _open()
        self._kernel.setblocking(False)
        sc.attach_socket_filter(self._kernel.fileno(), _changes_wanted())
        self._kernel.bind((0, _IPV4_ADDRESSES | _IPV4_ROUTES))

    def fileno(self) -> int:
        """A descriptor that is readable when something has changed."""
        return self._kernel.fileno()

    def drain(self) -> bool:
        """Whether something has changed since the last call."""
        changed = False
        while True:
            try:
                self._kernel.recv(1)
            except BlockingIOError:
                return changed
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # ENOBUFS: changes were lost for want of room
                    raise
            changed = True


def refuse_destination(address: str) -> None:
    """Add a route that makes `address` unreachable: connections to it fail with EHOSTUNREACH."""
    body = struct.pack(
        "BBBBBBBBI", socket.AF_INET, 32, 0, 0, _MAIN_TABLE, 3, 0, _ROUTE_UNREACHABLE, 0
    )
    _ask(_NEW_ROUTE, body + _attribute(_DESTINATION, socket.inet_aton(address)))


def refuse_connections(
    address: str, priority: int, port_left: int | None = None, length: int = 32
) -> None:
    """Add rules that refuse TCP and UDP to `address` except at `port_left`, if any: ip-rule(8).

    `length`: the length of the prefix, for a whole network. The rules apply before all routes
    except the local ones, and `address` can still be a router. They use the priorities `priority`
    and `priority` + 1. Raises OSError.
    """
    destination = _attribute(_DESTINATION, socket.inet_aton(address))
    for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        wanted = destination + _attribute(_PROTOCOL, bytes([protocol]))
        if port_left is not None:
            ports = _attribute(_PORTS, struct.pack("HH", port_left, port_left))
            _rule(_RULE_LOOKUP, priority, wanted + ports, length)
        _rule(_RULE_UNREACHABLE, priority + 1, wanted, length)


def look_for_neighbour(interface: int, address: str) -> None:
    """Send an ARP request for a neighbour, without waiting: NTF_USE of ip-neighbour(8).

    The neighbour learns the hardware address of this side from the request.
    """
    body = struct.pack("BxxxiHBB", socket.AF_INET, interface, 0, _USE, 0)
    _ask(_NEW_NEIGHBOUR, body + _attribute(_NEIGHBOUR, socket.inet_aton(address)))


def keep_neighbour(interface: int, address: str, hardware: bytes) -> None:
    """Add a permanent neighbour, or make it one, so that no ARP is needed: ip-neighbour(8)."""
    body = struct.pack("BxxxiHBB", socket.AF_INET, interface, _PERMANENT, 0, 0)
    known = _attribute(_NEIGHBOUR, socket.inet_aton(address))
    _ask(_NEW_NEIGHBOUR, body + known + _attribute(_HARDWARE_ADDRESS, hardware), _REPLACE)


def ask_for_no_neighbours(interface: int) -> None:
    """Stop the kernel from looking for neighbours on an interface.

    It then sends no ARP request and asks no program.
    """
    settings = _attribute(_INTERFACE, struct.pack("I", interface))
    for kind in (_PROBES_BY_PROGRAM, _PROBES):
        settings += _attribute(kind, struct.pack("I", 0))
    body = struct.pack("Bxxx", socket.AF_INET) + _attribute(_TABLE, b"arp_cache\0")
    _ask(_SET_NEIGHBOUR_TABLE, body + _attribute(_PARAMETERS, settings))


def _changes_wanted() -> bytes:
    """A socket filter that passes changes of addresses and of local routes only.

    On a router many other routes change each second.
    """
    kinds = [int.from_bytes(struct.pack("=H", kind)) for kind in (_NEW_ROUTE, _NEW_ROUTE + 1)]
    instructions = (
        (0x28, 0, 0, 4),  # the message's kind
        (0x15, 1, 0, kinds[0]),
        (0x15, 0, 2, kinds[1]),
        (0x30, 0, 0, 20),  # the route's table
        (0x15, 0, 1, _LOCAL_TABLE),
        (0x06, 0, 0, 0xFFFFFFFF),
        (0x06, 0, 0, 0),
    )
    return b"".join(struct.pack("=HBBI", *each) for each in instructions)


def _rule(action: int, priority: int, attributes: bytes, length: int) -> None:
    body = struct.pack("BBBBBBBBI", socket.AF_INET, length, 0, 0, _MAIN_TABLE, 0, 0, action, 0)
    _ask(_NEW_RULE, body + attributes + _attribute(_PRIORITY, struct.pack("I", priority)))


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("HH", data)
        yield kind, data[4:length]
        data = data[(length + 3) & ~3 :]


def _open(protocol: int = 0) -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("IHHII", 16 + len(body), kind, flags | _REQUEST, 1, 0) + body


def _ask(kind: int, body: bytes, flags: int = 0) -> None:
    with _open() as kernel:
        kernel.sendto(_message(kind, _ACKNOWLEDGE | _CREATE | flags, body), (0, 0))
        code = struct.unpack_from("i", kernel.recv(65_536), 16)[0]
    if code:
        raise OSError(-code, os.strerror(-code))


def _whole(kind: int, body: bytes, *, strict: bool = False) -> list[bytes]:
    """A dump of a list that did not change while it was read.

    Tries up to `_TRIES` times. Raises OSError: EINTR if the list changed at each try.
    """
    for tried in range(1, _TRIES + 1):
        try:
            return list(dump(kind, body, strict=strict))
        except InterruptedError:
            if tried == _TRIES:
                raise
    raise AssertionError


def dump(kind: int, body: bytes, *, strict: bool = False, protocol: int = 0) -> Iterator[bytes]:
    """The messages of a dump.

    `strict`: the kernel sends only the entries that match the fields of `body`. If the dump is not
    complete, OSError is raised at its end at the latest: InterruptedError if the list has changed
    meanwhile.
    """
    changed = False
    with _open(protocol) as kernel:
        kernel.setsockopt(_NETLINK, _STRICT, strict)
        kernel.sendto(_message(kind, _DUMP, body), (0, 0))
        while True:
            packet, _, cut, _ = kernel.recvmsg(_PACKET_BYTES)
            if cut & socket.MSG_TRUNC:
                raise _failure(errno.EMSGSIZE)
            for answered, flags, content in _messages(packet):
                changed |= bool(flags & _INTERRUPTED)
                if answered == _OVERRUN:
                    raise _failure(errno.ENOBUFS)
                if answered not in (_DONE, _ERROR):
                    yield content
                elif code := _code_in(content):
                    raise _failure(-code)
                elif changed:
                    raise _failure(errno.EINTR)
                else:
                    return


def _messages(packet: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The messages in a packet: kind, flags and the bytes after the header of each."""
    at = 0
    while at < len(packet):
        if len(packet) - at < _HEADER.size:
            raise _failure(errno.EBADMSG)
        length, kind, flags, _, _ = _HEADER.unpack_from(packet, at)
        if not _HEADER.size <= length <= len(packet) - at:
            raise _failure(errno.EBADMSG)
        yield kind, flags, packet[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def _code_in(content: bytes) -> int:
    """The negative errno in an error or in the last message; 0 for success."""
    (code,) = _CODE.unpack_from(content) if len(content) >= _CODE.size else (0,)
    return int(code)


def _failure(code: int) -> OSError:
    return OSError(code, f"the kernel's answer over netlink: {os.strerror(code)}")
