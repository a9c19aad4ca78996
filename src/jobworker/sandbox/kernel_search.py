"""Looks through one job's descriptors for kernel memory that its place alone does not tell.

`sandbox.kernel_memory` knows of such memory, and not whose it is: netlink sockets on the host's
network, and locks on files of which a job has not the device to itself (memfds, pipes, volumes
that others have too, files of the host), and sockets over IP that are in no list
(`sandbox.kernel_sockets`). Here is found what descriptors show, and mapped memfds.
What is in flight over UNIX sockets cannot be seen: fdinfo tells only how much is (`scm_fds`).

A job can have more descriptors than anyone can look at (tables of its threads, each charged to its
memory limit), so a search has an end. A table that many share is looked at once: kcmp(2).

Runs in a process of its own (`sandbox.chores`). Standard library only. Sources:
proc_pid_fdinfo(5), proc_pid_maps(5), unix(7).
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jobworker.sandbox import kernel_memory, kernel_sockets
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.kernel_memory import BYTES_PER_LOCK

SEARCH_SECONDS = 2.0
"""Of a processor: some 200,000 descriptors, or 60,000 sockets over IP."""
_SOCKET = "socket:["
_IN_FLIGHT = b"scm_fds:"


class Found(NamedTuple):
    """What one job holds, as far as it was looked at, in bytes."""

    locks: int = 0
    netlink: int = 0
    in_flight: int = 0
    """Descriptors that wait in its sockets."""
    is_all: bool = True
    """Whether there was time to look at everything."""
    in_sockets: int = 0
    """In those over IP, with what the job's group counts."""


def search(
    first_process: int, unknown_locks: Mapping[str, int], *, sockets_too: bool = False
) -> Found:
    """Look at the job of this PID 1; `unknown_locks` are bytes by file, as in /proc/locks.

    `sockets_too`: tell what sockets over IP hold.
    """
    locks = in_flight = in_sockets = 0
    sockets: set[int] = set()
    end = time.process_time() + SEARCH_SECONDS
    is_all = False
    threads = [
        thread
        for pid in kernel_memory.processes_of(first_process)
        for thread in kernel_memory.threads_of(pid)
    ]
    for thread, name, target, lines in _descriptors(threads):
        if target.startswith(_SOCKET):
            inode = int(target[len(_SOCKET) : -1])
            if sockets_too and inode not in sockets:
                in_sockets += _held_by(thread, int(name))
            sockets.add(inode)
        for line in lines:
            if line.startswith(b"lock:"):
                locks += BYTES_PER_LOCK
            elif line.startswith(_IN_FLIGHT):
                in_flight += int(line[len(_IN_FLIGHT) :])
        if time.process_time() > end:
            break
    else:
        mapped = set()
        for file in _mapped_memory_files(threads):
            mapped.add(file)
            if time.process_time() > end:
                break
        else:
            is_all = True
        locks += sum(size for file, size in unknown_locks.items() if file in mapped)
    netlink = 0
    if sockets and _is_on_host(first_process):
        buffers = kernel_memory.netlink_buffers("/proc/self")
        netlink = sum(size for inode, size in buffers if inode in sockets)
    return Found(locks, netlink, in_flight, is_all, in_sockets)


def _is_on_host(first_process: int) -> bool:
    own = os.stat("/proc/self/ns/net")
    for place in kernel_memory.places_of(first_process):
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(f"{place}/ns/net"), own)
    return False


def _held_by(thread: int, number: int) -> int:
    """What a descriptor's socket holds; 0 where that is not over IP, or cannot be told."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
        try:
            process = os.pidfd_open(thread, os.O_EXCL)  # PIDFD_THREAD
        except OSError:  # before Linux 6.9 only a process's first thread can be opened
            process = os.pidfd_open(thread)
        opened.callback(os.close, process)
        one = opened.enter_context(socket.socket(fileno=sc.pidfd_getfd(process, number)))
        if one.family in {socket.AF_INET, socket.AF_INET6}:
            return kernel_sockets.held_by(one)
    return 0


def _descriptors(threads: Iterable[int]) -> Iterator[tuple[int, str, str, list[bytes]]]:
    """Each by its thread and name: what it is, and what its fdinfo tells."""
    for thread in _distinct(threads, sc.KCMP_FILES):
        for name in _listed(f"/proc/{thread}/fd"):
            target, lines = "", list[bytes]()
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{thread}/fd/{name}")
                with open(f"/proc/{thread}/fdinfo/{name}", "rb") as file:
                    lines = file.readlines()
            yield thread, name, target, lines


def _mapped_memory_files(threads: Iterable[int]) -> Iterator[str]:
    """Memfds that are mapped: nobody maps one by chance, as one does libraries."""
    for thread in _distinct(threads, sc.KCMP_VM):
        with contextlib.suppress(OSError), open(f"/proc/{thread}/maps", "rb") as file:
            for line in file:
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(b"/memfd:"):
                    yield f"{fields[3].decode()}:{int(fields[4])}"
                else:
                    yield ""


def _distinct(threads: Iterable[int], kind: int) -> Iterator[int]:
    """One thread of all that share the same."""
    known: list[int] = []
    for thread in threads:
        try:
            at = _place_among(known, thread, kind)
        except OSError:  # one of the two has ended, or the kernel has no kcmp
            yield thread
            continue
        if at is not None:
            known.insert(at, thread)
            yield thread


def _place_among(known: Sequence[int], thread: int, kind: int) -> int | None:
    """Where it comes in the kernel's order; None where one of them shares what it has."""
    low, high = 0, len(known)
    while low < high:
        middle = (low + high) // 2
        order = sc.kcmp(thread, known[middle], kind)
        if order == 0:
            return None
        low, high = (low, middle) if order == 1 else (middle + 1, high)
    return low


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
