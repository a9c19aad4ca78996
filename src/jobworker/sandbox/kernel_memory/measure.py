"""Kernel memory that jobs hold and that no control group counts, measured from outside.

What the kernel charges to a job is bounded by its memory limit (docs/threat-model.md has the list).
Three kinds are charged to nobody, on cgroup v1 and v2 alike, and have no bound of their own:

- netlink sockets: what waits in their receive buffers, up to net.core.rmem_max, twice, for each;
  a structure of 2 KiB; and a request for a list, up to net.core.wmem_max, twice, which the kernel
  keeps until the socket has taken the list;
- locks on ranges of files: 192 bytes for each, as many as a process likes;
- connections that nobody has accepted: see `sandbox.kernel_memory.connections`.

They are asked for where a job cannot hide them, and not by its descriptors, of which it has as
many as it likes and which need not be in any table:

- `measure_netlink` reads two files for each network. The host's tell nothing of whose a socket is.
  Requests count there as received by the kernel's own sockets, whoever made them. The kernel makes
  each read of a page from the list's beginning (20,000 sockets: 0.2 s, 100,000: 8 s), so a part of
  a long list is read. How many sockets there are is told apart, at once.
- `measure_locks` reads /proc/locks, which tells a lock's file and mostly not its owner: it belongs
  to the job that alone has the file's device (its disk, its /dev/shm), else to nobody known. The
  kernel makes each read from the list's beginning, so that a long list takes longer by the square
  of its length (400,000 locks: a minute). So a list too short for the bound is not read, and of a
  longer one a sample is.

What neither can tell whose it is, is `unknown`: then `sandbox.kernel_memory.search` looks at
descriptors.

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

from jobworker.sandbox.log import say

T = TypeVar("T")
LookAt = Callable[[int], object]
"""Is told of each job before something is looked at that it shapes, and of 0 before all else: a
process that looks may die of it, or have to wait."""
BOUND_BYTES = 64 << 20
"""What a job may hold of each kind."""
BYTES_PER_LOCK = 192
NETLINK_BYTES = 2048
"""The structure of a netlink socket: of 1,096 bytes, for which the allocator takes 2,048."""
NETLINK_SECONDS = 0.5
"""For one job's networks: 25,000 sockets take less."""
HOST_SECONDS = 1.0
LOCKS_SECONDS = 3.0
"""For all jobs: 12 samples of half a million locks take as long."""
_LEAST_ROW_BYTES = 44
"""Of a row in a list of some 100,000."""
_SHORT_BYTES = BOUND_BYTES // BYTES_PER_LOCK * _LEAST_ROW_BYTES
_SAMPLES, _SAMPLE_BYTES = 12, 4096


class Measured(NamedTuple):
    """What is known of all jobs, in bytes."""

    held: dict[int, int]
    """By job."""
    unknown: dict[str, int]
    """That of a job or of none, by file, or as a sum: never a long list, as the launcher has to
    read it in one turn."""
    unfinished: frozenset[int] = frozenset()
    """Jobs of which more is held than could be counted in time."""
    in_sockets: dict[int, int] = {}  # noqa: RUF012 - never changed
    """By job, with what its group counts; by 0 what is no job's."""
    orphans: dict[int, int] = {}  # noqa: RUF012 - never changed
    """What of that is in sockets which nobody has open: an ended job may have left them. It has
    each job on the host's network whose ids were found, with 0 where there are none."""


class NetlinkSocket(NamedTuple):
    """One in the kernel's list."""

    inode: int
    """0 where it is the kernel's own."""
    memory_bytes: int
    """What waits in it."""
    is_listing: bool
    """Whether it has asked for a list and not taken all, so that the kernel keeps its request."""


def tell_nobody(_job: int) -> None:
    """A `LookAt` for who does not mind."""


def open_locks() -> int:
    """A descriptor for `measure_locks`, of the process namespace where this is called."""
    try:
        return os.open("/proc/locks", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        say(f"cannot read /proc/locks: {error}; how many locks on files a job takes is not bounded")
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def measure_netlink(first_processes: Mapping[int, int], look_at: LookAt = tell_nobody) -> Measured:
    """What waits in netlink sockets; `first_processes` are the jobs' ids by their PID 1's pid."""
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
    return Measured(dict(held), unknown, frozenset(unfinished))


def _netlink_on_host() -> int:
    """What is there, as far as it matters whether that is more than the bound."""
    end = time.process_time() + HOST_SECONDS
    size = _netlink_structures("/proc/self")
    for one in netlink_sockets("/proc/self"):
        size += one.memory_bytes
        if size > BOUND_BYTES or time.process_time() > end:
            return max(size, BOUND_BYTES + 1)  # the rest may hold as much
    return size


def measure_locks(
    file: int, first_processes: Mapping[int, int], look_at: LookAt = tell_nobody
) -> Measured:
    """An estimate of the locks on files, where there are so many that a job may be over the bound.

    Wrong by up to some 30 MiB. `file` is from `open_locks`. What is read through another process
    namespace than the host's leaves out locks whose owner has ended, and those live on where its
    descriptors are shared (clone(2) with CLONE_FILES). `first_processes` are as above.
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
    return Measured(
        {job: int(size) for job, size in held.items()},
        {locked: int(size) for locked, size in unknown.items()},
    )


def _sample(file: int, seconds: float) -> Iterator[tuple[bytes, float]]:
    """Rows of a long file, and how many of it each stands for; none of a short one."""
    end = time.process_time() + seconds
    if not os.pread(file, 1, _SHORT_BYTES):
        return
    size = 2 * _SHORT_BYTES
    while os.pread(file, 1, size) and time.process_time() < end - seconds / 2:
        size *= 2  # a list of millions is sampled as far as one read of it takes no longer
    width = size // _SAMPLES
    taken = []
    for number in random.sample(range(_SAMPLES), _SAMPLES):
        at = int((number + random.random()) * width)  # noqa: S311 - no secret
        taken.append(os.pread(file, _SAMPLE_BYTES, at))
        if time.process_time() > end:
            break
    for part in taken:
        rows = part.split(b"\n")[1:-1]  # without the halves
        row_bytes = sum(map(len, rows)) + len(rows)
        for row in rows:
            yield row, width / row_bytes * _SAMPLES / len(taken)


def _own_devices(first_processes: Mapping[int, int], look_at: LookAt) -> dict[str, int]:
    """The jobs that alone have a device, by its number as /proc/locks writes it."""
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
        # Its paths are of the job's making, and need not be text.
        with contextlib.suppress(OSError), open(f"{place}/mountinfo", "rb") as file:
            numbers = {tuple(line.split(maxsplit=3)[2].split(b":")) for line in file}
            return {f"{int(major):02x}:{int(minor):02x}" for major, minor in numbers}
    return set()


def _namespaces(first_processes: Mapping[int, int]) -> dict[int, int]:
    jobs = {}
    for pid, job in first_processes.items():
        with contextlib.suppress(OSError):  # it has just ended
            jobs[os.stat(f"/proc/{pid}/ns/pid").st_ino] = job
    return jobs


def processes_of(first_process: int) -> Sequence[int]:
    """The pids of the job whose PID 1 this is."""
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
    """Where /proc tells of a process that lives: of its first thread, which may have ended, else
    of others."""
    if os.path.exists(f"/proc/{pid}/ns/net"):
        yield f"/proc/{pid}"
        return
    for thread in threads_of(pid):
        yield f"/proc/{pid}/task/{thread}"


def threads_of(pid: int) -> list[int]:
    """The ids of a process's threads; none where it has ended."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def netlink_sockets(place: str) -> Iterator[NetlinkSocket]:
    """Those of a process's network that are bound."""
    with open(f"{place}/net/netlink") as file:
        next(file)
        for row in map(str.split, file):
            if len(row) >= 10:
                inode = int(row[9]) if row[2] != "0" else 0
                yield NetlinkSocket(inode, int(row[4]), row[6] != "0")


def _netlink_structures(place: str) -> int:
    """What all netlink sockets of a process's network take by themselves, bound or not."""
    with open(f"{place}/net/protocols") as file:
        for row in map(str.split, file):
            if row[0] == "NETLINK":
                return int(row[2]) * NETLINK_BYTES
    return 0


def until(end: float, what: Iterable[T]) -> Iterator[T]:
    """As long as this process has not used so much time of a processor."""
    for one in what:
        yield one
        if time.process_time() > end:
            return
