"""The user of this host that has opened a connection to the service: sock_diag(7).

The service asks the kernel for the socket at the other end. The kernel finds it only in the
service's own network namespace: the socket of a program, or of a job, on the host's network.
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
"""The end of struct inet_diag_sockid: interface, cookie."""
_ANY_STATE = _NO_COOKIE = 0xFFFFFFFF
_ADDRESS_BYTES = 16
_PLACE = slice(_HEADER.size + 4, _HEADER.size + 4 + _PORTS.size + 32)
"""The ports and addresses in the inet_diag_sockid of struct inet_diag_msg."""
_OWNER = struct.Struct("=II")
_OWNER_AT = _HEADER.size + 64
"""The place of idiag_uid and idiag_inode in struct inet_diag_msg."""
_MAPPED = b"\0" * 10 + b"\xff\xff"
"""The prefix of an IPv4 address at an IPv6 socket: RFC 4291, section 2.5.5.2."""
_TIMEOUT_SECONDS = 0.01
"""The kernel answers within the system call that asks. This bound is for a kernel that does not
answer at all."""
_WHOLE_MAP = [0, 0, 0xFFFFFFFF]
"""uid_map of the initial user namespace: user_namespaces(7)."""
_CLOSED = -1
IDS_TOGETHER = 65_536
"""Ids from here on belong to containers, in ranges of this size, and to directory services."""


def local_user(tcp: socket.socket | trio.socket.SocketType, jobs: Container[int]) -> str | None:
    """A name for the user at the other end of a connection; None if it is unknown or not local.

    All ids of `jobs` share one name, since each job has many ids. Each account of the host has its
    own name, and so has each range of other ids that one container may have. All sockets that
    their program has closed share one name. Otherwise a program that uses another address of the
    host for each connection would get a new name each time.
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
    """The user id of the socket at the other end.

    It is `_CLOSED` if no process has the socket open any more, and None if it is not on this host.
    """
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
    if _HEADER.unpack_from(reply)[1] != _SOCK_DIAG_BY_FAMILY:  # NLMSG_ERROR: no socket
        return None
    # If there is no such connection, the kernel returns the socket that listens at that port.
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
    """Whether this process is in the initial user namespace; elsewhere many ids look the same."""
    return [int(word) for word in Path("/proc/self/uid_map").read_text().split()] == _WHOLE_MAP
