"""The memory that jobs hold in sockets over IP, measured network by network.

Connections that no process has accepted: the kernel charges their memory to no group. An incoming
connection belongs to no control group until accept(2) gives it to a process, on cgroup v1 and v2
alike. No limit counts its received data, nor its own structure. A queue has up to
net.core.somaxconn connections, and a job may have any number of queues. Measured on Linux 6.1:
218 MiB in 4,000 connections of a job that was charged 5 MiB.

sock_diag(7) shows the memory of each connection; its inode is 0 if it is not accepted. A connection
that its sender has reset is in no list, and keeps its received data until it is accepted. But it
still counts in the length of the listening socket's queue. So if the kernel has more memory in TCP
than all listed connections hold, a job with many unlisted connections may be over the bound.

Buffers of the jobs' other sockets: the kernel charges received data, and data that TCP has to send.
It does not charge data in error queues, nor data that UDP has sent or keeps open (MSG_MORE). The
list shows the sum of each socket, and the job's group shows how much of all sums is charged. So the
launcher gets the sums and subtracts the charged part (`sandbox.launcher.kernel_watch`).

A closed socket lives on until its peer has taken the sent data, for minutes if the peer takes
nothing: an orphan, tcp(7). It keeps its user id. On the host's network it outlives its job, and
another job may have the ids by then. So orphans there are counted apart.

This runs in a process of its own (`sandbox.chores`), which enters each network. On the host's
network a socket belongs to the job that has the socket's user among its ids. A connection that is
not accepted belongs to the owner of the listening socket (`sandbox.kernel_memory.listeners`).
Standard library only. Sources: sock_diag(7), linux/inet_diag.h, net/ipv4/inet_connection_sock.c
(inet_csk_accept, mem_cgroup_sk_alloc), net/core/skbuff.c (sock_queue_err_skb), tcp(7), udp(7).
"""

import contextlib
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.kernel_memory import measure as kernel_memory
from jobworker.sandbox.kernel_memory import sockets as kernel_sockets
from jobworker.sandbox.kernel_memory.listeners import Listeners, SocketOwners
from jobworker.sandbox.kernel_memory.measure import BOUND_BYTES, LookAt, Measurement, tell_nobody
from jobworker.sandbox.kernel_memory.sockets import CLOSE_WAIT, ESTABLISHED, LISTEN, Socket

CONNECTION_BYTES = 4096
"""The structures of one connection: 3.8 KB measured on Linux 6.1."""
MOST_RECEIVED_BYTES = 2 * 212_992
"""The most received data of one connection, by the kernel's default of net.core.rmem_max: the
kernel doubles the value of SO_RCVBUF, socket(7)."""
JOB_SECONDS = 1.0
HOST_SECONDS = 1.0
"""Processor time for a network: enough for some 250,000 sockets."""
_TCP = re.compile(rb"^TCP:.* mem (\d+)", re.MULTILINE)
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


class UnacceptedConnections(NamedTuple):
    """The connections of a job, or of one of its networks, that are not accepted."""

    memory_bytes: int = 0
    unseen: int = 0
    """The number of connections that were reset, and so are in no list."""


class _Network(NamedTuple):
    """The sockets of one network that could be read in time."""

    tcp: list[Socket]
    buffers: list[tuple[int, int]]
    """The user id and the bytes of each open socket, without connections that are not accepted."""
    orphans: list[tuple[int, int]]
    """The same for each socket that no process has open."""
    is_all: bool

    @property
    def tcp_bytes(self) -> int:
        return sum(one.memory_bytes for one in self.tcp)


def measure(first_processes: Mapping[int, int], look_at: LookAt = tell_nobody) -> Measurement:
    """Measure sockets over IP; `first_processes` is as in `sandbox.kernel_memory.measure`.

    `held` of the result is the memory of connections that are not accepted. `unfinished` has also
    the jobs whose unlisted connections may be over the bound.
    """
    held: dict[int, int] = defaultdict(int)
    unseen: dict[int, int] = defaultdict(int)
    in_sockets: dict[int, int] = defaultdict(int)
    unfinished, most = set(), _most_received()
    owners, networks = _networks(first_processes, look_at)
    orphans: dict[int, int] = defaultdict(int, dict.fromkeys(owners.jobs, 0))

    def count(job: int, sockets: Iterable[Socket]) -> None:
        waiting = unaccepted_in(sockets)
        held[job] += waiting.memory_bytes
        unseen[job] += waiting.unseen

    on_host = _read("/proc/self", HOST_SECONDS)
    known_bytes = on_host.tcp_bytes
    for owner, sockets in _by_job(on_host.tcp, owners).items():
        if owner is None:
            known_bytes -= sum(one.memory_bytes for one in sockets)
        else:
            count(owner, sockets)
    for uid, size in on_host.buffers:
        in_sockets[owners.of(uid)] += size
    for uid, size in on_host.orphans:
        in_sockets[owners.of(uid)] += size
        orphans[owners.of(uid)] += size
    for job, place in networks:
        look_at(job)
        with contextlib.suppress(OSError):
            _enter(place)
            network = _read(place, JOB_SECONDS)
            known_bytes += network.tcp_bytes
            count(job, network.tcp)
            in_sockets[job] += sum(size for _, size in network.buffers + network.orphans)
            if not network.is_all:
                unfinished.add(job)
    look_at(0)
    with open("/proc/net/sockstat", "rb") as file:
        is_much = tcp_bytes(file.read()) - known_bytes > BOUND_BYTES
    if is_much:
        unfinished.update(job for job, number in unseen.items() if number * most > BOUND_BYTES)
    held.pop(0, None)  # no job's
    return Measurement(dict(held), {}, frozenset(unfinished - {0}), dict(in_sockets), dict(orphans))


def _networks(
    first_processes: Mapping[int, int], look_at: LookAt
) -> tuple[SocketOwners, list[tuple[int, str]]]:
    """The jobs on the host's network, and each job's own networks, by a process there."""
    own = os.stat("/proc/self/ns/net").st_ino
    ranges: dict[range, int] = {}
    networks: dict[int, tuple[int, str]] = {}
    for job, pids in kernel_memory.processes_by_job(first_processes).items():
        look_at(job)
        for pid in pids:
            for place in kernel_memory.places_of(pid):
                with contextlib.suppress(OSError, ValueError):  # the process has just ended
                    network = os.stat(f"{place}/ns/net").st_ino
                    if network == own:
                        ids = _ids_at(place)
                        if os.getuid() not in ids:  # else other sockets have that user, too
                            ranges[ids] = job
                    else:
                        networks.setdefault(network, (job, place))
    look_at(0)
    return SocketOwners(ranges), list(networks.values())


def tcp_bytes(sockstat: bytes) -> int:
    """The bytes in TCP buffers of the whole host, in whichever network the file was read."""
    found = _TCP.search(sockstat)
    return int(found[1]) * _PAGE_BYTES if found else 0


def _most_received() -> int:
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/net/core/rmem_max") as file:
        return max(2 * int(file.read()), MOST_RECEIVED_BYTES)
    return MOST_RECEIVED_BYTES


def unaccepted_in(sockets: Iterable[Socket]) -> UnacceptedConnections:
    """The connections that are not accepted, among the sockets of one network or of one job."""
    queued = seen = memory_bytes = 0
    for one in sockets:
        if one.state == LISTEN:
            queued += one.queue
        elif _is_waiting(one):
            seen += 1
            memory_bytes += one.memory_bytes
    return UnacceptedConnections(
        memory_bytes + max(queued, seen) * CONNECTION_BYTES, max(0, queued - seen)
    )


def _is_waiting(one: Socket) -> bool:
    return not one.inode and one.state in {ESTABLISHED, CLOSE_WAIT}


def _by_job(sockets: Sequence[Socket], owners: SocketOwners) -> dict[int | None, list[Socket]]:
    """The listening sockets on the host's network and their waiting connections, by their owner.

    The owner is 0 if it is no job, and None if it is unknown (`Listeners`).
    """
    found: dict[int | None, list[Socket]] = defaultdict(list)
    listening = [one for one in sockets if one.state == LISTEN]
    for one in listening:
        found[owners.of(one.uid)].append(one)
    listeners = Listeners(listening, owners)
    for one in filter(_is_waiting, sockets):
        found[listeners.owner_of(one)].append(one)
    return found


def _ids_at(place: str) -> range:
    with open(f"{place}/uid_map") as file:
        _, first, count = map(int, file.readline().split())
    return range(first, first + count)


def _enter(place: str) -> None:
    network = os.open(f"{place}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        sc.setns(network, sc.CLONE_NEWNET)
    finally:
        os.close(network)


def _listed(protocol: int) -> Iterator[Socket]:
    """The sockets of a protocol; none if this kernel cannot list them, which the log reports."""
    with contextlib.suppress(FileNotFoundError):
        yield from kernel_sockets.sockets(protocol)


def _read(place: str, seconds: float) -> _Network:
    """Read the sockets of this process's network; `place` is a process in it."""
    end = time.process_time() + seconds
    found = _Network([], [], [], is_all=True)
    for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        for one in _listed(protocol):
            if protocol == socket.IPPROTO_TCP:
                found.tcp.append(one)
            if one.memory_bytes and one.inode:
                found.buffers.append((one.uid, one.memory_bytes))
            elif one.memory_bytes and not _is_waiting(one):
                found.orphans.append((one.uid, one.memory_bytes))
            if time.process_time() > end:
                return found._replace(is_all=False)
    found.buffers.extend(kernel_sockets.ping_sockets(place))
    return found
