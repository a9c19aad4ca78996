"""Which user of this host has opened a connection that comes from it: sock_diag(7).

The kernel is asked for the socket at the other end. It is found only where that is in the network
namespace of the service: a program on the host's network, a job's among them.
"""

import socket
import struct
from collections.abc import Container
from contextlib import suppress
from functools import cache
from pathlib import Path

import trio

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""
_REQUEST = struct.Struct("=BBBxI")
"""struct inet_diag_req_v2 up to the id: family, protocol, extensions, states."""
_PORTS = struct.Struct(">HH")
_REST_OF_ID = struct.Struct("=III")
"""Of struct inet_diag_sockid: interface, cookie."""
_ANY_STATE = _NO_COOKIE = 0xFFFFFFFF
_ADDRESS_BYTES = 16
_PLACE = slice(_HEADER.size + 4, _HEADER.size + 4 + _PORTS.size + 32)
"""Of struct inet_diag_msg: the ports and addresses of its inet_diag_sockid."""
_OWNER = struct.Struct("=II")
_OWNER_AT = _HEADER.size + 64
"""idiag_uid and idiag_inode of it."""
_MAPPED = b"\0" * 10 + b"\xff\xff"
"""Before an IPv4 address that an IPv6 socket has: RFC 4291, 2.5.5.2."""
_TIMEOUT_SECONDS = 0.01
"""The kernel answers within the call that asks; this is for one that never does."""
_WHOLE_MAP = [0, 0, 0xFFFFFFFF]
"""uid_map of the initial user namespace: user_namespaces(7)."""
_CLOSED = -1
IDS_TOGETHER = 65_536
"""Ids from here on belong to containers, by ranges of so many, and to directory services."""


def local_user(tcp: socket.socket | trio.socket.SocketType, jobs: Container[int]) -> str | None:
    """Whose the other end of a connection is; None for one from elsewhere, or where unknown.

    All that have an id of `jobs` have one name, since each job has many. An account of the host has
    one of its own, and so has each range of other ids that one container may have. All whose
    program has closed them have one as well: who may have an address of the host's for each
    connection would have a name for each.
    """
    with suppress(OSError, ValueError, struct.error):
        uid = _owner_of_peer(tcp)
        if uid is None:
            return None
        if uid == _CLOSED:
            return "closed"
        if uid in jobs or (uid and not _sees_all_ids()):
            return "jobs"
        if uid < IDS_TOGETHER:
            return f"uid {uid}"
        first = uid // IDS_TOGETHER * IDS_TOGETHER
        return f"uids {first} to {first + IDS_TOGETHER - 1}"
    return None


def _owner_of_peer(tcp: socket.socket | trio.socket.SocketType) -> int | None:
    """The id, `_CLOSED` where it belongs to nobody any more, None where it is not here."""
    family = tcp.family
    theirs, ours = tcp.getpeername(), tcp.getsockname()
    addresses = [_packed(family, name[0]) for name in (theirs, ours)]
    if all(len(address) == 4 for address in addresses):
        family = socket.AF_INET
    place = _PORTS.pack(theirs[1], ours[1])
    place += b"".join(address.ljust(_ADDRESS_BYTES, b"\0") for address in addresses)
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _ANY_STATE) + place
    body += _REST_OF_ID.pack(0, _NO_COOKIE, _NO_COOKIE)
    header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_TIMEOUT_SECONDS)
        kernel.send(header + body)
        reply = kernel.recv(1024)
    if _HEADER.unpack_from(reply)[1] != _SOCK_DIAG_BY_FAMILY:  # NLMSG_ERROR: there is none
        return None
    # Where there is no such connection, the kernel tells of whoever listens at that port.
    uid, inode = _OWNER.unpack_from(reply, _OWNER_AT)
    mapped = _PORTS.pack(theirs[1], ours[1]) + b"".join(_MAPPED + each for each in addresses)
    if reply[_PLACE] not in (place, mapped):
        return None
    return int(uid) if inode else _CLOSED


def _packed(family: int, host: str) -> bytes:
    packed = socket.inet_pton(family, host.partition("%")[0])
    return packed.removeprefix(_MAPPED)  # an IPv4 client of a listener at "::"


@cache
def _sees_all_ids() -> bool:
    """Whether this process is in the initial user namespace; else accounts can't be told apart."""
    return [int(word) for word in Path("/proc/self/uid_map").read_text().split()] == _WHOLE_MAP
