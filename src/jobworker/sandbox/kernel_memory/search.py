"""Looks through one job's descriptors for kernel memory that its place alone does not tell.

`sandbox.kernel_memory.measure` knows of such memory, and not whose it is: netlink sockets on the
host's network, and locks on files of which a job has not the device to itself (memfds, pipes,
volumes that others have too, files of the host), and sockets over IP that are in no list
(`sandbox.kernel_memory.sockets`), and pages in pipes (`sandbox.kernel_memory.pipes`). Here is found
what descriptors show, and mapped memfds.
What is in flight over UNIX sockets cannot be seen: fdinfo tells only how much is (`scm_fds`).

A netlink socket is asked itself what it holds. The kernel's list of them takes longer by the square
of its length, which any job can make long. It is read, as far as there is time, for sockets that
cannot be asked, and where a job has so many that requests which the kernel keeps for them may be
over the bound: the list tells which sockets have made one, and only the sum of all requests.

A job can have more descriptors than anyone can look at (tables of its threads, each charged to its
memory limit), so a search has an end. A table that many share is looked at once: kcmp(2).

A job can also hold locks of the kernel's for as long as it likes, by calls that wait for its own
pages. So nothing is asked here that takes a socket's lock, or that of an epoll or inotify instance,
as its fdinfo does. That is read only where much is locked on the inode that all of these share. A
process that has to wait for a job all the same is ended by the launcher (`sandbox.chores`).

Runs in a process of its own (`sandbox.chores`). Standard library only. Sources:
proc_pid_fdinfo(5), proc_pid_maps(5), unix(7).
"""

import contextlib
import errno
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.kernel_memory import measure as kernel_memory
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
"""Of a processor: some 200,000 descriptors, or 60,000 sockets."""
PIPES_SECONDS = 1.0
"""Of a processor, after that: some 100,000 pipes."""
MOST_SENT_BYTES = 2 * 212_992
"""In one request, by the kernel's own net.core.wmem_max: SO_SNDBUF takes it twice, socket(7)."""
_SOCKET, _KIND_OF_SOCKET = "socket:[", "system.sockprotoname"
_PIPE = "pipe:["
_IN_FLIGHT = b"scm_fds:"
_WATCHES = {"anon_inode:[eventpoll]", "anon_inode:inotify", "anon_inode:[fanotify]"}
"""Their fdinfo has a line for each thing that is watched, and waits for a lock."""
_PIECE_BYTES = 1 << 16
_GONE = {errno.ESRCH, errno.EBADF, errno.ENOTSOCK}


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
    in_requests: int = 0
    """At most in requests of its netlink sockets. What is surely in them counts as netlink, too."""
    in_pipes: int = 0
    """The bytes in its pipes, where these are so many that they may be over the bound."""
    most_in_pipes: int = 0
    """What their slots keep at most."""


def search(
    first_process: int,
    unknown_locks: Mapping[str, int],
    *,
    sockets_too: bool = False,
    enough_bytes: int = sys.maxsize,
) -> Found:
    """Look at the job of this PID 1; `unknown_locks` are bytes by file, as in /proc/locks.

    `sockets_too`: tell what sockets over IP hold, and pipes, where these may hold `enough_bytes`.
    It ends early where more than the bound is found, or more than `enough_bytes` in those: a job
    that hoards goes on meanwhile.
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
        for file in _mapped_memory_files(threads):
            mapped.add(file)
            if time.process_time() > end:
                break
        else:
            is_all = True
        shown.locks += sum(size for file, size in unknown_locks.items() if file in mapped)
    # Another network has a list of its own, which is measured whole.
    on_host = _is_on_host(first_process)
    in_requests = shown.netlink_sockets * _most_sent() if on_host else 0
    if shown.netlink <= BOUND_BYTES and (shown.unasked or in_requests > BOUND_BYTES):
        listed = list(kernel_memory.until(end, kernel_memory.netlink_sockets("/proc/self")))
        # Those that the job has opened since its descriptors were looked at are in the list, too.
        opened = kernel_memory.until(end, _sockets_of(first_process))
        known, most = _in_requests(listed, {*shown.sockets, *opened}, _most_sent())
        shown.netlink += sum(one.memory_bytes for one in listed if one.inode in shown.unasked)
        if time.process_time() <= end:
            in_requests = most
            shown.netlink += known
        elif shown.unasked:
            is_all = False
    in_pipes = shown.ask_pipes(enough_bytes)
    return Found(
        locks=shown.locks,
        netlink=shown.netlink,
        in_flight=shown.in_flight,
        is_all=is_all,
        in_sockets=shown.in_sockets,
        in_requests=in_requests,
        in_pipes=in_pipes.bytes,
        most_in_pipes=in_pipes.most_bytes,
    )


def _is_on_host(first_process: int) -> bool:
    own = os.stat("/proc/self/ns/net")
    for place in kernel_memory.places_of(first_process):
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(f"{place}/ns/net"), own)
    return False


class _Shown:
    """What a job's descriptors show."""

    def __init__(self, unknown_locks: Mapping[str, int], *, sockets_too: bool) -> None:
        self.locks = self.in_flight = self.in_sockets = self.netlink = self.netlink_sockets = 0
        self.sockets, self.unasked = set[int](), set[int]()
        """By inode: all, and those of netlink that this host does not let be asked."""
        self._sockets_too, self._unknown_locks = sockets_too, unknown_locks
        self._pipes = dict[tuple[int, int], tuple[int, int]]()
        """Those that may be filled, by device and inode: the thread and descriptor to ask."""
        self._read = set[tuple[int, int]]()
        """Those of which an end was seen that tells whether they are filled."""

    def take_in(self, threads: Iterable[int]) -> Iterator[None]:
        """Look at what they have open, a piece at a time."""
        for thread, name, target in _descriptors(threads):
            inode = _inode_in(target)
            if inode and inode not in self.sockets:
                self.sockets.add(inode)
                self._add_socket(thread, name, inode)
            elif self._sockets_too and target.startswith((_PIPE, "/")):
                self._add_pipe(thread, int(name))
            if target not in _WATCHES or _file_at(thread, name) in self._unknown_locks:
                for lines in _fdinfo(thread, name):
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
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:  # it is closed
            status = os.stat(f"/proc/{thread}/fd/{number}")
            place = status.st_dev, status.st_ino
            if not stat.S_ISFIFO(status.st_mode) or place in self._read:
                return
            is_filled = kernel_pipes.is_filled(_copy_of(thread, number, opened))
            if is_filled is not None:
                self._read.add(place)
            if is_filled is False:
                self._pipes.pop(place, None)
            else:
                self._pipes.setdefault(place, (thread, number))

    def ask_pipes(self, enough_bytes: int) -> InPipe:
        """What its pipes hold, where that may be enough: to ask one takes its lock."""
        size = most = 0
        if len(self._pipes) * kernel_pipes.most_in_one() > enough_bytes:
            end = time.process_time() + PIPES_SECONDS
            for thread, number in kernel_memory.until(end, self._pipes.values()):
                with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
                    held = kernel_pipes.held_in(_copy_of(thread, number, opened))
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
    """The inodes of a job's sockets, with some 0."""
    for _, _, target in _descriptors(_threads_of(first_process)):
        yield _inode_in(target)


def _inode_in(target: str) -> int:
    """A socket's, by what a descriptor's link tells; 0 where that is no socket's."""
    return int(target[len(_SOCKET) : -1]) if target.startswith(_SOCKET) else 0


def _in_requests(
    listed: Sequence[NetlinkSocket], sockets: Set[int], most_sent: int
) -> tuple[int, int]:
    """What requests of these sockets hold at least, where others hold the most, and at most."""
    kept = sum(one.memory_bytes for one in listed if not one.inode)
    listing = [one.inode in sockets for one in listed if one.is_listing]
    most, of_others = sum(listing) * most_sent, listing.count(False) * most_sent
    return min(most, max(0, kept - of_others)), min(most, kept)


def _most_sent() -> int:
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/net/core/wmem_max") as file:
        return max(2 * int(file.read()), MOST_SENT_BYTES)
    return MOST_SENT_BYTES


def _is_netlink(thread: int, name: str) -> bool:
    with contextlib.suppress(OSError):  # it is closed
        return os.getxattr(f"/proc/{thread}/fd/{name}", _KIND_OF_SOCKET) == b"NETLINK\0"
    return False


def _held_by(thread: int, number: int) -> int | None:
    """What a descriptor's socket holds, as `kernel_memory.sockets.held_by` tells; 0 where it is
    closed.

    None where this host does not let it be asked.
    """
    try:
        with contextlib.ExitStack() as opened:
            return kernel_sockets.held_by(_copy_of(thread, number, opened))
    except OSError as error:
        return 0 if error.errno in _GONE else None


def _copy_of(thread: int, number: int, opened: contextlib.ExitStack) -> int:
    """A descriptor like the thread's, until `opened` is left. Raises OSError."""
    try:
        process = os.pidfd_open(thread, os.O_EXCL)  # PIDFD_THREAD
    except OSError:  # before Linux 6.9 only a process's first thread can be opened
        process = os.pidfd_open(thread)
    opened.callback(os.close, process)
    copy = sc.pidfd_getfd(process, number)
    opened.callback(os.close, copy)
    return copy


def _descriptors(threads: Iterable[int]) -> Iterator[tuple[int, str, str]]:
    """Each by its thread and name: what it is."""
    for thread in _distinct(threads, sc.KCMP_FILES):
        for name in _listed(f"/proc/{thread}/fd"):
            target = ""
            with contextlib.suppress(OSError):  # it is closed
                target = os.readlink(f"/proc/{thread}/fd/{name}")
            yield thread, name, target


def _fdinfo(thread: int, name: str) -> Iterator[list[bytes]]:
    """What a descriptor's fdinfo tells, a few of its lines at a time: it may have millions."""
    with contextlib.suppress(OSError), open(f"/proc/{thread}/fdinfo/{name}", "rb") as file:
        while lines := file.readlines(_PIECE_BYTES):
            yield lines


def _file_at(thread: int, name: str) -> str:
    """The file that a descriptor leads to, as in /proc/locks; "" where it is closed."""
    with contextlib.suppress(OSError):
        status = os.stat(f"/proc/{thread}/fd/{name}")
        device = status.st_dev
        return f"{os.major(device):02x}:{os.minor(device):02x}:{status.st_ino}"
    return ""


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
