"""Kernel memory that jobs hold and that no control group counts, measured from outside.

The job's memory limit bounds the memory that the kernel charges to it (docs/threat-model.md has the
list). The kernel charges three kinds to no group, on cgroup v1 and v2 alike, and has no bound for
them:

- netlink sockets. Each has data in its receive buffer, up to twice net.core.rmem_max; a structure
  of 2 KiB; and a request for a list, up to twice net.core.wmem_max, which the kernel keeps until
  the socket has taken the list;
- locks on ranges of files: 192 bytes for each, and a process may have any number;
- connections that no process has accepted: see `sandbox.kernel_memory.connections`.

They are measured where a job cannot hide them, and not by its descriptors. A job may have any
number of descriptors, and they need not be in any table:

- `measure_netlink` reads two files for each network. Those of the host do not show the owner of a
  socket. Requests count there as received by the kernel's own sockets, whoever made them. For each
  page the kernel walks the list from its beginning (20,000 sockets: 0.2 s, 100,000: 8 s), so only a
  part of a long list is read. The number of sockets comes from another file, at once.
- `measure_locks` reads /proc/locks, which has a lock's file and mostly not its owner. A lock
  belongs to the job that alone has the file's device (its disk, its /dev/shm); otherwise its owner
  is unknown. For each read the kernel walks the list from its beginning, so the time grows with the
  square of the list's length (400,000 locks: a minute). So a list that is too short to reach the
  bound is not read, and a longer one is sampled.

Memory without a known owner is `unknown`: then `sandbox.kernel_memory.search` looks at descriptors.

Each runs in a process of its own (`sandbox.chores`). Standard library only. Sources:
proc_locks(5), proc_pid_mountinfo(5), proc_pid_net(5), netlink(7), fs/locks.c, fs/seq_file.c.
"""

import contextlib
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from jobworker.sandbox.log import log_line

T = TypeVar("T")
LookAt = Callable[[int], object]
"""Called with a job's id before a process reads files whose content that job shapes, and with 0
before it reads others: reading a job's files may kill the process or make it wait."""
BOUND_BYTES = 64 << 20
"""The most bytes that a job may hold of each kind."""
BYTES_PER_LOCK = 192
NETLINK_BYTES = 2048
"""The size of a netlink socket's structure: it has 1,096 bytes, and the allocator takes 2,048."""
NETLINK_SECONDS = 0.5
"""Processor time for one job's networks: 25,000 sockets take less."""
HOST_SECONDS = 1.0
LOCKS_SECONDS = 3.0
"""Processor time for the locks of all jobs: 12 samples of half a million locks take as long."""
_LEAST_ROW_BYTES = 44
"""The shortest row in a list of some 100,000 locks."""
_SHORT_BYTES = BOUND_BYTES // BYTES_PER_LOCK * _LEAST_ROW_BYTES
_SAMPLES, _SAMPLE_BYTES = 12, 4096


class Measurement(NamedTuple):
    """The result of a measurement of all jobs, in bytes."""

    held: dict[int, int]
    """The memory of each job."""
    unknown: dict[str, int]
    """Memory of unknown owners, jobs or not, by file or as a sum. It is never a long list, since
    the launcher has to read it in one turn."""
    unfinished: frozenset[int] = frozenset()
    """Jobs that hold more than could be counted in time."""
    in_sockets: dict[int, int] = {}  # noqa: RUF012 - never changed
    """The memory in sockets of each job, also what its group counts; 0 stands for no job."""
    orphans: dict[int, int] = {}  # noqa: RUF012 - never changed
    """The part of it in sockets that no process has open: an ended job may have left them. It has
    an entry for each job on the host's network whose ids were found, 0 if it has no such socket."""


class NetlinkSocket(NamedTuple):
    """A netlink socket in the kernel's list."""

    inode: int
    """0 if it is the kernel's own."""
    memory_bytes: int
    """The data that waits in its receive buffer."""
    is_listing: bool
    """Whether it has requested a list and not taken all of it: the kernel keeps the request."""


def tell_nobody(_job: int) -> None:
    """A `LookAt` that does nothing."""


def open_locks() -> int:
    """A descriptor for `measure_locks`, of the process namespace where this is called."""
    try:
        return os.open("/proc/locks", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        log_line(
            f"cannot read /proc/locks: {error}; how many locks on files a job takes is not bounded"
        )
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def measure_netlink(
    first_processes: Mapping[int, int], look_at: LookAt = tell_nobody
) -> Measurement:
    """Measure the memory of netlink sockets.

    `first_processes` has each job's id by the pid of its first process.
    """
    own = os.stat("/proc/self/ns/net").st_ino
    held: dict[int, int] = defaultdict(int)
    unfinished, is_on_host = set(), False
    for job, pids in processes_by_job(first_processes).items():
        look_at(job)
        end = time.process_time() + NETLINK_SECONDS
        seen = {own}
        for pid in pids:
            for place in places_of(pid):
                with contextlib.suppress(OSError):
                    network = os.stat(f"{place}/ns/net").st_ino
                    is_on_host |= network == own
                    if network not in seen:
                        seen.add(network)
                        held[job] += _netlink_structures(place)
                        sockets = until(end, netlink_sockets(place))
                        held[job] += sum(one.memory_bytes for one in sockets)
            if time.process_time() > end:
                unfinished.add(job)
                break
    look_at(0)
    unknown = {"netlink": _netlink_on_host()} if is_on_host else {}
    return Measurement(dict(held), unknown, frozenset(unfinished))


def _netlink_on_host() -> int:
    """The memory of netlink sockets in the host's network, counted only up to `BOUND_BYTES`."""
    end = time.process_time() + HOST_SECONDS
    size = _netlink_structures("/proc/self")
    for one in netlink_sockets("/proc/self"):
        size += one.memory_bytes
        if size > BOUND_BYTES or time.process_time() > end:
            return max(size, BOUND_BYTES + 1)  # the sockets not counted may hold so much
    return size


def measure_locks(
    file: int, first_processes: Mapping[int, int], look_at: LookAt = tell_nobody
) -> Measurement:
    """Estimate the memory of locks on files, if there are enough to bring a job over the bound.

    The error is up to some 30 MiB. `file` is from `open_locks`. If it was opened in another process
    namespace than the host's, it leaves out locks whose owner has ended. Such locks live on while
    another process shares its descriptors (clone(2) with CLONE_FILES). `first_processes` is as in
    `measure_netlink`.
    """
    held, unknown = defaultdict[int, float](float), defaultdict[str, float](float)
    rows = list(_sample(file, LOCKS_SECONDS))
    if rows:
        devices = _own_devices(first_processes, look_at)
        for row, stands_for in rows:
            fields = row.replace(b"->", b"").split()
            if len(fields) == 8:
                locked = fields[5].decode()
                job = devices.get(locked.rpartition(":")[0])
                if job is None:
                    unknown[locked] += stands_for * BYTES_PER_LOCK
                else:
                    held[job] += stands_for * BYTES_PER_LOCK
    return Measurement(
        {job: int(size) for job, size in held.items()},
        {locked: int(size) for locked, size in unknown.items()},
    )


def _sample(file: int, seconds: float) -> Iterator[tuple[bytes, float]]:
    """Sample rows of a long file; each comes with the number of rows that it stands for.

    A file that is too short for the bound has no sample.
    """
    end = time.process_time() + seconds
    if not os.pread(file, 1, _SHORT_BYTES):
        return
    size = 2 * _SHORT_BYTES
    while os.pread(file, 1, size) and time.process_time() < end - seconds / 2:
        size *= 2  # of a list of millions, only the part that can be read in half the time
    width = size // _SAMPLES
    taken = []
    for number in random.sample(range(_SAMPLES), _SAMPLES):
        at = int((number + random.random()) * width)  # noqa: S311 - no secret
        taken.append(os.pread(file, _SAMPLE_BYTES, at))
        if time.process_time() > end:
            break
    for part in taken:
        rows = part.split(b"\n")[1:-1]  # without the cut rows at both ends
        row_bytes = sum(map(len, rows)) + len(rows)
        for row in rows:
            yield row, width / row_bytes * _SAMPLES / len(taken)


def _own_devices(first_processes: Mapping[int, int], look_at: LookAt) -> dict[str, int]:
    """The job of each device that one job alone has, by the device's number as in /proc/locks."""
    others, found = _devices(["/proc/self"]), dict[int, set[str]]()
    for pid, job in first_processes.items():
        look_at(job)
        found[job] = _devices(places_of(pid)) - others
    look_at(0)
    count = Counter(device for devices in found.values() for device in devices)
    return {
        device: job for job, devices in found.items() for device in devices if count[device] == 1
    }


def _devices(places: Iterable[str]) -> set[str]:
    for place in places:
        # A job chooses the paths in it, and they need not be text.
        with contextlib.suppress(OSError), open(f"{place}/mountinfo", "rb") as file:
            numbers = {tuple(line.split(maxsplit=3)[2].split(b":")) for line in file}
            return {f"{int(major):02x}:{int(minor):02x}" for major, minor in numbers}
    return set()


def _namespaces(first_processes: Mapping[int, int]) -> dict[int, int]:
    jobs = {}
    for pid, job in first_processes.items():
        with contextlib.suppress(OSError):  # the process has just ended
            jobs[os.stat(f"/proc/{pid}/ns/pid").st_ino] = job
    return jobs


def processes_of(first_process: int) -> Sequence[int]:
    """The pids of the job that has this first process."""
    return processes_by_job({first_process: 1}).get(1, [])


def processes_by_job(first_processes: Mapping[int, int]) -> dict[int, list[int]]:
    """The pids of each job's processes."""
    jobs = _namespaces(first_processes)
    found: dict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                job = jobs.get(os.stat(f"/proc/{name}/ns/pid").st_ino)
                if job is not None:
                    found[job].append(int(name))
    return found


def places_of(pid: int) -> Iterator[str]:
    """The directories of /proc with a living process's entries.

    That is the process's own. If its first thread has ended, it is those of its other threads.
    """
    if os.path.exists(f"/proc/{pid}/ns/net"):
        yield f"/proc/{pid}"
        return
    for thread in threads_of(pid):
        yield f"/proc/{pid}/task/{thread}"


def threads_of(pid: int) -> list[int]:
    """The ids of a process's threads; none if it has ended."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def netlink_sockets(place: str) -> Iterator[NetlinkSocket]:
    """The bound netlink sockets of a process's network."""
    with open(f"{place}/net/netlink") as file:
        next(file)
        for row in map(str.split, file):
            if len(row) >= 10:
                inode = int(row[9]) if row[2] != "0" else 0
                yield NetlinkSocket(inode, int(row[4]), row[6] != "0")


def _netlink_structures(place: str) -> int:
    """The bytes of the structures of all netlink sockets of a process's network, bound or not."""
    with open(f"{place}/net/protocols") as file:
        for row in map(str.split, file):
            if row[0] == "NETLINK":
                return int(row[2]) * NETLINK_BYTES
    return 0


def until(end: float, what: Iterable[T]) -> Iterator[T]:
    """Yield items until this process has used `end` seconds of processor time, or none are left."""
    for one in what:
        yield one
        if time.process_time() > end:
            return
