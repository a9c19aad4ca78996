"""TCP connections of jobs that nobody has accepted: the kernel charges their memory to no group.

A connection that comes in belongs to no control group until accept(2) gives it to a process, on
cgroup v1 and v2 alike. What it has received waits outside of every limit, and so does its own
structure, however many there are: a queue has up to net.core.somaxconn, and a job as many queues as
it likes. Measured on Linux 6.1: 218 MiB in 4,000 connections of a job that was charged 5 MiB.

sock_diag(7) tells of each connection what it holds, and an inode of 0 where it is not accepted.
But one that its sender has reset is in no list any more and keeps what it has received, until it is
accepted. It still counts in the length of the queue that the listening socket tells. So where the
kernel has more in TCP than all connections that can be seen, a job with many that cannot be seen is
in doubt.

Runs in a process of its own (`sandbox.chores`), which enters each network. On the host's network a
connection is whose the listening socket of its address is, by the range of ids that a job has.
Standard library only. Sources: sock_diag(7), linux/inet_diag.h, net/ipv4/inet_connection_sock.c
(inet_csk_accept, mem_cgroup_sk_alloc), tcp(7).
"""

import contextlib
import os
import re
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from jobworker.sandbox import kernel_memory, netlink
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.kernel_memory import BOUND_BYTES, Measured

CONNECTION_BYTES = 4096
"""The structure of one, with what belongs to it: 3.8 KB measured on Linux 6.1."""
MOST_RECEIVED_BYTES = 2 * 212_992
"""In one, by the kernel's own net.core.rmem_max: SO_RCVBUF takes it twice, socket(7)."""
JOB_SECONDS = 1.0
HOST_SECONDS = 1.0
"""Of a processor: some 250,000 sockets."""
_ESTABLISHED, _SYN_RECEIVED, _TIME_WAIT, _CLOSE_WAIT, _LISTEN = 1, 3, 6, 8, 10
_STATES = 0xFFE & ~(1 << _SYN_RECEIVED | 1 << _TIME_WAIT)
"""Those of sockets that have buffers."""
_MEMORY = 7
"""INET_DIAG_SKMEMINFO: received, bound, sent, bound, ahead, queued, options, backlog, drops."""
_ROW = struct.Struct("=BBxx2s2x16s32xI4xII")
"""struct inet_diag_msg: family, state, port, address, queue, user, inode."""
_ATTRIBUTE, _SIZES = struct.Struct("=HH"), struct.Struct("=8I")
_TCP = re.compile(rb"^TCP:.* mem (\d+)", re.MULTILINE)
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


class Connection(NamedTuple):
    """A TCP socket."""

    state: int
    port: bytes
    address: bytes
    queue: int
    """How many connections wait in it, where it listens."""
    uid: int
    inode: int
    memory_bytes: int


class Waiting(NamedTuple):
    """Connections that are not accepted: of a job, or of one of its networks."""

    memory_bytes: int = 0
    unseen: int = 0
    """Those that were reset."""


def measure(first_processes: Mapping[int, int]) -> Measured:
    """What waits to be accepted; `first_processes` as in `sandbox.kernel_memory`.

    `unfinished` are also jobs of which connections that cannot be seen may be over the bound.
    """
    held: dict[int, int] = defaultdict(int)
    unseen: dict[int, int] = defaultdict(int)
    unfinished, own, most = set(), os.stat("/proc/self/ns/net").st_ino, _most_received()
    ranges: dict[range, int] = {}
    networks: dict[int, tuple[int, str]] = {}
    for job, pids in kernel_memory.processes_by_job(first_processes).items():
        for pid in pids:
            for place in kernel_memory.places_of(pid):
                with contextlib.suppress(OSError, ValueError):  # it has just ended
                    network = os.stat(f"{place}/ns/net").st_ino
                    if network == own:
                        ranges[_ids_at(place)] = job
                    else:
                        networks.setdefault(network, (job, place))

    def count(job: int, sockets: Iterable[Connection]) -> None:
        waiting = waiting_in(sockets)
        held[job] += waiting.memory_bytes
        unseen[job] += waiting.unseen

    on_host = _read(HOST_SECONDS)[0]
    known_bytes = sum(one.memory_bytes for one in on_host)
    for job, sockets in _by_job(on_host, ranges).items():
        count(job, sockets)
    for job, place in networks.values():
        with contextlib.suppress(OSError):
            _enter(place)
            sockets, is_all = _read(JOB_SECONDS)
            known_bytes += sum(one.memory_bytes for one in sockets)
            count(job, sockets)
            if not is_all:
                unfinished.add(job)
    with open("/proc/net/sockstat", "rb") as file:
        is_much = tcp_bytes(file.read()) - known_bytes > BOUND_BYTES
    for job, number in unseen.items():
        if is_much and number * most > BOUND_BYTES:
            unfinished.add(job)
    return Measured(dict(held), {}, frozenset(unfinished))


def tcp_bytes(sockstat: bytes) -> int:
    """What the whole host has in buffers of TCP, in whatever network it is read."""
    found = _TCP.search(sockstat)
    return int(found[1]) * _PAGE_BYTES if found else 0


def _most_received() -> int:
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/net/core/rmem_max") as file:
        return max(2 * int(file.read()), MOST_RECEIVED_BYTES)
    return MOST_RECEIVED_BYTES


def waiting_in(sockets: Iterable[Connection]) -> Waiting:
    """What waits to be accepted among the sockets of one network, or of one job in it."""
    queued = seen = memory_bytes = 0
    for one in sockets:
        if one.state == _LISTEN:
            queued += one.queue
        elif _is_waiting(one):
            seen += 1
            memory_bytes += one.memory_bytes
    return Waiting(memory_bytes + max(queued, seen) * CONNECTION_BYTES, max(0, queued - seen))


def _is_waiting(one: Connection) -> bool:
    return not one.inode and one.state in {_ESTABLISHED, _CLOSE_WAIT}


def _by_job(
    sockets: Iterable[Connection], ranges: Mapping[range, int]
) -> dict[int, list[Connection]]:
    """The listening sockets of the jobs, and what waits in them, on the host's network."""
    found: dict[int, list[Connection]] = defaultdict(list)
    owners: dict[tuple[bytes, bytes], int] = {}
    rest = []
    for one in sockets:
        if one.state == _LISTEN:
            for ids, job in ranges.items():
                if one.uid in ids:
                    found[job].append(one)
                    owners[one.port, one.address] = job
        elif _is_waiting(one):
            rest.append(one)
    for one in rest:
        for address in (one.address, bytes(16)):
            job = owners.get((one.port, address), 0)
            if job:
                found[job].append(one)
                break
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


def _read(seconds: float) -> tuple[list[Connection], bool]:
    """The TCP sockets of this process's network, and whether there was time for all of them."""
    end = time.process_time() + seconds
    found = []
    for one in connections():
        found.append(one)
        if time.process_time() > end:
            return found, False
    return found, True


def connections() -> Iterator[Connection]:
    """The TCP sockets of this process's network. Raises OSError."""
    for family in (socket.AF_INET, socket.AF_INET6):
        wanted = 1 << (_MEMORY - 1)
        body = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, wanted, _STATES)
        for row in netlink.dump(netlink.SOCKETS, body, protocol=netlink.SOCK_DIAG):
            _, state, port, address, queue, uid, inode = _ROW.unpack_from(row)
            yield Connection(state, port, address, queue, uid, inode, _memory_bytes(row))


def _memory_bytes(row: bytes) -> int:
    at = _ROW.size
    while at < len(row):
        length, kind = _ATTRIBUTE.unpack_from(row, at)
        if kind == _MEMORY:
            received, _, _, _, ahead, queued, options, backlog = _SIZES.unpack_from(row, at + 4)
            return int(received + ahead + queued + options + backlog)
        at += (length + 3) & ~3
    return 0
