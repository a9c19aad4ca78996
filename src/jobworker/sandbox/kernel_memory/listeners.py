"""Whose a TCP connection on the host's network is that nobody has accepted: the listening socket's.

The connection itself tells no user. The kernel has chosen a listening socket for it, and what it
took from that socket tells which: the port, the family, and the device that the socket is bound to.
(So a connection over IPv4 at a socket of IPv6 is of IPv6 too, and its address an IPv4-mapped one.)
Of sockets that have these in common, the kernel prefers one of the very address to one of any; one
that is for IPv6 alone gets nothing of IPv4. Two listening sockets of different users never have the
address in common as well: bind(2) and listen(2) refuse that, with SO_REUSEPORT too.

A device may differ all the same: a listening socket can be bound to one later, and a connection
with a link-local peer has its device. Then it is whose the sockets of all devices are, where that
is one job. Else it is nobody's: no job ends for what may be another's. The queue's length tells of
it where the connections really wait, as with those that were reset
(`sandbox.kernel_memory.connections`).

Standard library only. Sources: net/ipv4/inet_hashtables.c and net/ipv6/inet6_hashtables.c
(compute_score), inet_request_bound_dev_if, tcp_v6_syn_recv_sock, socket(7), ipv6(7).
"""

import bisect
import socket
from collections.abc import Iterable, Mapping

from jobworker.sandbox.kernel_memory.sockets import Socket

_MAPPED = bytes(10) + b"\xff\xff"
_ANY, _ANY_MAPPED = bytes(16), _MAPPED + bytes(4)


class Owners:
    """The jobs on the host's network, by the ranges of ids that they have."""

    def __init__(self, ranges: Mapping[range, int]) -> None:
        self._rows = sorted((ids.start, ids.stop, job) for ids, job in ranges.items())

    @property
    def jobs(self) -> frozenset[int]:
        """The jobs whose ids are known."""
        return frozenset(job for _, _, job in self._rows)

    def of(self, uid: int) -> int:
        """The job that has this id; 0 where none has."""
        at = bisect.bisect(self._rows, uid, key=lambda row: row[0]) - 1
        if at >= 0:
            _, stop, job = self._rows[at]
            return job if uid < stop else 0
        return 0


class Listeners:
    """The listening sockets of one network; 0 is the owner of those that are no job's."""

    def __init__(self, listening: Iterable[Socket], owners: Owners) -> None:
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
        """The job at whose socket a connection waits, 0 where no job's; None: it cannot be told."""
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
