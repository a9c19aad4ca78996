"""A search of one job's descriptors for kernel memory whose owner no list shows.

`sandbox.kernel_memory.measure` finds such memory, but not its owner: netlink sockets on the host's
network, and locks on files whose device the job does not have alone (memfds, pipes, volumes that
other jobs have too, files of the host). Sockets over IP that are in no list
(`sandbox.kernel_memory.sockets`) and pages in pipes (`sandbox.kernel_memory.pipes`) are such memory
too. This module finds the memory behind the job's descriptors, and mapped memfds. It cannot read
descriptors in flight over UNIX sockets: fdinfo shows only how many there are (`scm_fds`).

The search reads the memory of a netlink socket from the socket itself. Reading the kernel's list of
them takes a time that grows with the square of its length, and any job can make it long. So the
list is read, within the time limit, in two cases only: for sockets that cannot be read themselves,
and if a job has so many sockets that the requests which the kernel keeps for them may be over the
bound. The list shows which sockets have made a request, but only the sum of all requests.

A job can have more descriptors than a search can read (each of its threads may have a table, which
its memory limit counts). So a search has a time limit.

A job can also hold locks of the kernel for as long as it likes, by calls that wait for its own
pages. So the search calls nothing that takes a socket's lock, or the lock of an epoll or inotify
instance. Reading the fdinfo of such an instance takes its lock. The search reads it only if much is
locked on the inode that all of these share. If the process has to wait for a job all the same, the
launcher ends it (`sandbox.chores`).

It runs in a process of its own (`sandbox.chores`). Standard library only. Sources:
proc_pid_fdinfo(5), unix(7).
"""

import contextlib
import errno
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from jobworker.sandbox.kernel_memory import measure as kernel_memory
from jobworker.sandbox.kernel_memory import open_files
from jobworker.sandbox.kernel_memory import pipes as kernel_pipes
from jobworker.sandbox.kernel_memory import sockets as kernel_sockets
from jobworker.sandbox.kernel_memory.measure import (
    BOUND_BYTES,
    BYTES_PER_LOCK,
    NETLINK_BYTES,
    NetlinkSocket,
)
from jobworker.sandbox.kernel_memory.pipes import InPipe

SEARCH_SECONDS = 2.0
"""Processor time of a search: enough for some 200,000 descriptors, or 60,000 sockets."""
PIPES_SECONDS = 1.0
"""Processor time for pipes after that: enough for some 100,000."""
MOST_SENT_BYTES = 2 * 212_992
"""The largest request, by the kernel's default of net.core.wmem_max: the kernel doubles the value
of SO_SNDBUF, socket(7)."""
_SOCKET, _KIND_OF_SOCKET = "socket:[", "system.sockprotoname"
_PIPE = "pipe:["
_IN_FLIGHT = b"scm_fds:"
_WATCHES = {"anon_inode:[eventpoll]", "anon_inode:inotify", "anon_inode:[fanotify]"}
"""Descriptors whose fdinfo has a line for each watched object, and takes a lock."""
_GONE = {errno.ESRCH, errno.EBADF, errno.ENOTSOCK}


class SearchResult(NamedTuple):
    """The memory of one job that the search has found, in bytes."""

    locks: int = 0
    netlink: int = 0
    in_flight: int = 0
    """The number of descriptors that wait in its sockets."""
    is_all: bool = True
    """Whether the search read everything within its time limit."""
    in_sockets: int = 0
    """The memory in its sockets over IP, including the part that the job's group counts."""
    in_requests: int = 0
    """The most memory that requests of its netlink sockets may have. The part that they surely have
    is in `netlink`, too."""
    in_pipes: int = 0
    """The bytes in its pipes; 0 if it has too few pipes to be over the bound."""
    most_in_pipes: int = 0
    """The most bytes that the slots of its pipes may keep."""


def search(
    first_process: int,
    unknown_locks: Mapping[str, int],
    *,
    sockets_too: bool = False,
    enough_bytes: int = sys.maxsize,
) -> SearchResult:
    """Search the descriptors of the job with this first process.

    `unknown_locks` are bytes by file, with files as in /proc/locks. With `sockets_too` the search
    also reads sockets over IP, and pipes if they may hold `enough_bytes`. It ends early once it has
    found more than the bound, or more than `enough_bytes` in sockets or pipes, since a job that
    hoards goes on meanwhile.
    """
    shown = _Shown(unknown_locks, sockets_too=sockets_too)
    end = time.process_time() + SEARCH_SECONDS
    is_all = False
    threads = _threads_of(first_process)
    for _ in shown.take_in(threads):
        is_enough = max(shown.locks, shown.netlink) > BOUND_BYTES or shown.in_sockets > enough_bytes
        if is_enough or time.process_time() > end:
            break
    else:
        mapped = set()
        for file in open_files.mapped_memory_files(threads if _has_file(unknown_locks) else ()):
            mapped.add(file)
            if time.process_time() > end:
                break
        else:
            is_all = True
        shown.locks += sum(size for file, size in unknown_locks.items() if file in mapped)
    # The list of another network is the job's own, and `measure` reads all of it.
    on_host = _is_on_host(first_process)
    in_requests = shown.netlink_sockets * _most_sent() if on_host else 0
    if shown.netlink <= BOUND_BYTES and (shown.unasked or in_requests > BOUND_BYTES):
        listed = list(kernel_memory.until(end, kernel_memory.netlink_sockets("/proc/self")))
        # The list has also sockets that the job opened after its descriptors were read.
        opened = kernel_memory.until(end, _sockets_of(first_process))
        known, most = _in_requests(listed, {*shown.sockets, *opened}, _most_sent())
        shown.netlink += sum(one.memory_bytes for one in listed if one.inode in shown.unasked)
        if time.process_time() <= end:
            in_requests = most
            shown.netlink += known
        elif shown.unasked:
            is_all = False
    in_pipes = shown.ask_pipes(enough_bytes)
    return SearchResult(
        locks=shown.locks,
        netlink=shown.netlink,
        in_flight=shown.in_flight,
        is_all=is_all,
        in_sockets=shown.in_sockets,
        in_requests=in_requests,
        in_pipes=in_pipes.bytes,
        most_in_pipes=in_pipes.most_bytes,
    )


def _has_file(unknown: Mapping[str, int]) -> bool:
    """Whether a mapping could explain some of this memory, which has files or a sum by name.

    Reading mappings waits for a fork(2) of the process. A job with many processes and little of a
    processor may take seconds for one: 5 s were measured beside 100 of them.
    """
    return any(":" in name for name in unknown)


def _is_on_host(first_process: int) -> bool:
    own = os.stat("/proc/self/ns/net")
    for place in kernel_memory.places_of(first_process):
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(f"{place}/ns/net"), own)
    return False


class _Shown:
    """The memory behind the descriptors that were read so far."""

    def __init__(self, unknown_locks: Mapping[str, int], *, sockets_too: bool) -> None:
        self.locks = self.in_flight = self.in_sockets = self.netlink = self.netlink_sockets = 0
        self.sockets, self.unasked = set[int](), set[int]()
        """The inodes of all its sockets, and of the netlink sockets that could not be read."""
        self._sockets_too, self._unknown_locks = sockets_too, unknown_locks
        self._pipes = dict[tuple[int, int], tuple[int, int]]()
        """The pipes that may have data, by device and inode: a thread and its descriptor."""
        self._read = set[tuple[int, int]]()
        """The pipes of which the search has found an end that shows whether they have data."""

    def take_in(self, threads: Iterable[int]) -> Iterator[None]:
        """Read the descriptors of threads; yields after each piece, so the caller can end it."""
        for thread, name, target in open_files.descriptors(threads):
            inode = _inode_in(target)
            if inode and inode not in self.sockets:
                self.sockets.add(inode)
                self._add_socket(thread, name, inode)
            elif self._sockets_too and target.startswith((_PIPE, "/")):
                self._add_pipe(thread, int(name))
            if target not in _WATCHES or open_files.file_at(thread, name) in self._unknown_locks:
                for lines in open_files.fdinfo(thread, name):
                    self._add(lines)
                    yield
            yield

    def _add(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            if line.startswith(b"lock:"):
                self.locks += BYTES_PER_LOCK
            elif line.startswith(_IN_FLIGHT):
                self.in_flight += int(line[len(_IN_FLIGHT) :])

    def _add_socket(self, thread: int, name: str, inode: int) -> None:
        if _is_netlink(thread, name):
            size = _held_by(thread, int(name))
            self.netlink += NETLINK_BYTES + (size or 0)
            self.netlink_sockets += 1
            if size is None:
                self.unasked.add(inode)
        elif self._sockets_too:
            self.in_sockets += _held_by(thread, int(name)) or 0

    def _add_pipe(self, thread: int, number: int) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:  # closed meanwhile
            status = os.stat(f"/proc/{thread}/fd/{number}")
            place = status.st_dev, status.st_ino
            if not stat.S_ISFIFO(status.st_mode) or place in self._read:
                return
            is_filled = kernel_pipes.is_filled(open_files.copy_of(thread, number, opened))
            if is_filled is not None:
                self._read.add(place)
            if is_filled is False:
                self._pipes.pop(place, None)
            else:
                self._pipes.setdefault(place, (thread, number))

    def ask_pipes(self, enough_bytes: int) -> InPipe:
        """Read the job's pipes, if they may hold `enough_bytes`: reading one takes its lock."""
        size = most = 0
        if len(self._pipes) * kernel_pipes.most_in_one() > enough_bytes:
            end = time.process_time() + PIPES_SECONDS
            for thread, number in kernel_memory.until(end, self._pipes.values()):
                with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
                    held = kernel_pipes.held_in(open_files.copy_of(thread, number, opened))
                    size, most = size + held.bytes, most + held.most_bytes
                if size > enough_bytes:
                    break
        return InPipe(size, most)


def _threads_of(first_process: int) -> list[int]:
    return [
        thread
        for pid in kernel_memory.processes_of(first_process)
        for thread in kernel_memory.threads_of(pid)
    ]


def _sockets_of(first_process: int) -> Iterator[int]:
    """The inodes of a job's sockets, and a 0 for each other descriptor."""
    for _, _, target in open_files.descriptors(_threads_of(first_process)):
        yield _inode_in(target)


def _inode_in(target: str) -> int:
    """The inode of a socket, from the target of a descriptor's link; 0 if it is no socket."""
    return int(target[len(_SOCKET) : -1]) if target.startswith(_SOCKET) else 0


def _in_requests(
    listed: Sequence[NetlinkSocket], sockets: Set[int], most_sent: int
) -> tuple[int, int]:
    """The least and the most memory in requests of these sockets.

    It is the least if all other sockets have the largest requests.
    """
    kept = sum(one.memory_bytes for one in listed if not one.inode)
    listing = [one.inode in sockets for one in listed if one.is_listing]
    most, of_others = sum(listing) * most_sent, listing.count(False) * most_sent
    return min(most, max(0, kept - of_others)), min(most, kept)


def _most_sent() -> int:
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/net/core/wmem_max") as file:
        return max(2 * int(file.read()), MOST_SENT_BYTES)
    return MOST_SENT_BYTES


def _is_netlink(thread: int, name: str) -> bool:
    with contextlib.suppress(OSError):  # closed meanwhile
        return os.getxattr(f"/proc/{thread}/fd/{name}", _KIND_OF_SOCKET) == b"NETLINK\0"
    return False


def _held_by(thread: int, number: int) -> int | None:
    """The bytes that a descriptor's socket holds, from `kernel_memory.sockets.held_by`.

    It is 0 if the descriptor is closed, and None if this host does not let it be read.
    """
    try:
        with contextlib.ExitStack() as opened:
            return kernel_sockets.held_by(open_files.copy_of(thread, number, opened))
    except OSError as error:
        return 0 if error.errno in _GONE else None
