"""The owner of a TCP connection on the host's network that no process has accepted.

The owner is the job of the listening socket, since the connection itself has no user. The kernel
has chosen a listening socket for it, and the connection has the port, the family and the device of
that socket. (So a connection over IPv4 at an IPv6 socket is an IPv6 connection too, with an
IPv4-mapped address.) Among sockets that share these three, the kernel prefers a socket that is
bound to the exact address over one that is bound to any address. A socket for IPv6 alone gets no
connection over IPv4. Two listening sockets of different users never share the address as well:
bind(2) and listen(2) refuse that, with SO_REUSEPORT too.

The device may still differ: a listening socket can be bound to a device later, and a connection
with a link-local peer has the device on which it came in. Then the owner is the job that has the
sockets of all devices, if that is one job. Otherwise the connection has no owner: no job ends for a
connection that may be another's. It still counts in the length of the queue in which it waits, like
a connection that was reset (`sandbox.kernel_memory.connections`).

Standard library only. Sources: net/ipv4/inet_hashtables.c and net/ipv6/inet6_hashtables.c
(compute_score), inet_request_bound_dev_if, tcp_v6_syn_recv_sock, socket(7), ipv6(7).
"""

import bisect
import socket
from collections.abc import Iterable, Mapping

from jobworker.sandbox.kernel_memory.sockets import Socket

_MAPPED = bytes(10) + b"\xff\xff"
_ANY, _ANY_MAPPED = bytes(16), _MAPPED + bytes(4)


class SocketOwners:
    """The jobs on the host's network, by the ranges of ids that they have."""

    def __init__(self, ranges: Mapping[range, int]) -> None:
        self._rows = sorted((ids.start, ids.stop, job) for ids, job in ranges.items())

    @property
    def jobs(self) -> frozenset[int]:
        """The jobs whose ids are known."""
        return frozenset(job for _, _, job in self._rows)

    def of(self, uid: int) -> int:
        """The job that has this user id; 0 if none has it."""
        at = bisect.bisect(self._rows, uid, key=lambda row: row[0]) - 1
        if at >= 0:
            _, stop, job = self._rows[at]
            return job if uid < stop else 0
        return 0


class Listeners:
    """The listening sockets of one network; a socket that belongs to no job has the owner 0."""

    def __init__(self, listening: Iterable[Socket], owners: SocketOwners) -> None:
        self._jobs: dict[tuple[int, bytes, bytes], dict[int, set[int]]] = {}
        """By family, port and address, then by device."""
        for one in listening:
            addresses = [one.address]
            if one.family == socket.AF_INET6 and one.address == _ANY and not one.only_ipv6:
                addresses.append(_ANY_MAPPED)
            for address in addresses:
                devices = self._jobs.setdefault((one.family, one.port, address), {})
                devices.setdefault(one.device, set()).add(owners.of(one.uid))

    def owner_of(self, connection: Socket) -> int | None:
        """The job at whose socket a connection waits.

        It is 0 if the socket belongs to no job, and None if the owner is unknown.
        """
        is_mapped = connection.address.startswith(_MAPPED)
        tiers = [
            self._jobs.get((connection.family, connection.port, address), {})
            for address in (connection.address, _ANY_MAPPED if is_mapped else _ANY)
        ]
        for devices in tiers:
            if connection.device in devices:
                return _only(devices[connection.device])
        return _only({job for devices in tiers for jobs in devices.values() for job in jobs})


def _only(jobs: set[int]) -> int | None:
    return next(iter(jobs)) if len(jobs) == 1 else None
