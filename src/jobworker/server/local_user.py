"""Which user of this host has opened a connection that comes from it: sock_diag(7).

The kernel is asked for the socket at the other end. It is found only where that is in the network
namespace of the service: a program on the host's network, a job's among them.
"""

import socket
import struct
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
_USER_AT = _HEADER.size + 64
"""idiag_uid of struct inet_diag_msg."""
_TIMEOUT_SECONDS = 0.01
"""The kernel answers within the call that asks; this is for one that never does."""
_WHOLE_MAP = [0, 0, 0xFFFFFFFF]
"""uid_map of the initial user namespace: user_namespaces(7)."""
FIRST_SHARED = 65_536
"""Ids from here on are no accounts: ranges of them belong to jobs, and to containers."""


def local_user(tcp: socket.socket | trio.socket.SocketType) -> str | None:
    """Whose the other end of a connection is; None for one from elsewhere, or where unknown.

    An account is told by its "uid 1000". All that are none have one name, since a job has many ids.
    """
    with suppress(OSError, ValueError, struct.error):
        uid = _owner_of_peer(tcp)
        if uid is None:
            return None
        account = uid < FIRST_SHARED if _sees_all_ids() else uid == 0
        return f"uid {uid}" if account else "jobs and containers"
    return None


def _owner_of_peer(tcp: socket.socket | trio.socket.SocketType) -> int | None:
    family = tcp.family
    theirs, ours = tcp.getpeername(), tcp.getsockname()
    addresses = [_packed(family, name[0]) for name in (theirs, ours)]
    if all(len(address) == 4 for address in addresses):
        family = socket.AF_INET
    body = (
        _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _ANY_STATE)
        + _PORTS.pack(theirs[1], ours[1])
        + b"".join(address.ljust(_ADDRESS_BYTES, b"\0") for address in addresses)
        + _REST_OF_ID.pack(0, _NO_COOKIE, _NO_COOKIE)
    )
    header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_TIMEOUT_SECONDS)
        kernel.send(header + body)
        reply = kernel.recv(1024)
    if _HEADER.unpack_from(reply)[1] != _SOCK_DIAG_BY_FAMILY:  # NLMSG_ERROR: there is none
        return None
    (uid,) = struct.unpack_from("=I", reply, _USER_AT)
    return int(uid)


def _packed(family: int, host: str) -> bytes:
    packed = socket.inet_pton(family, host.partition("%")[0])
    return packed.removeprefix(b"\0" * 10 + b"\xff\xff")  # an IPv4 client of a listener at "::"


@cache
def _sees_all_ids() -> bool:
    """Whether this process is in the initial user namespace; else accounts can't be told apart."""
    return [int(word) for word in Path("/proc/self/uid_map").read_text().split()] == _WHOLE_MAP
