"""Kernel memory that jobs hold and that no control group counts, measured from outside.

What the kernel charges to a job is bounded by its memory limit (docs/threat-model.md has the list).
Two kinds are charged to nobody, on cgroup v1 and v2 alike, and have no bound of their own:

- what waits in the receive buffers of netlink sockets: up to net.core.rmem_max, twice, for each;
- locks on ranges of files: 192 bytes for each, as many as a process likes.

`measure` finds them in /proc: sockets by network namespace, or by inode where a job is on the
host's network; locks in fdinfo. The more descriptors jobs have the longer it takes, so it runs in a
process of its own (`sandbox.chores`). What it does not find: sockets that a job on the host's
network has sent to itself (SCM_RIGHTS) and not received; unix(7) bounds the number of those.

Standard library only. Sources: proc_pid_fdinfo(5), proc_pid_net(5), netlink(7).
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

BYTES_PER_LOCK = 192
_SOCKET = "socket:["


def measure(first_processes: Mapping[int, int]) -> dict[int, int]:
    """The bytes that each job holds; `first_processes` are the jobs' ids by their PID 1's pid."""
    jobs = {}
    for pid, job in first_processes.items():
        with contextlib.suppress(OSError):  # it has just ended
            jobs[_namespace(pid, "pid")] = job
    processes = _processes_of(jobs)
    held: dict[int, int] = defaultdict(int)
    for job, pids in processes.items():
        for pid in pids:
            held[job] += BYTES_PER_LOCK * locks_of(pid)
    for job, count in _netlink(processes).items():
        held[job] += count
    return dict(held)


def _processes_of(jobs: Mapping[int, int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                job = jobs.get(_namespace(int(name), "pid"))
                if job is not None:
                    found[job].append(int(name))
    return found


def _namespace(pid: int, kind: str) -> int:
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


def locks_of(pid: int) -> int:
    """How many locks on files a process has."""
    count = 0
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fdinfo"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/fdinfo/{name}", "rb") as file:
                count += sum(line.startswith(b"lock:") for line in file)
    return count


def _netlink(processes: Mapping[int, Iterable[int]]) -> dict[int, int]:
    own = _namespace(os.getpid(), "net")
    held: dict[int, int] = defaultdict(int)
    on_host: dict[int, list[int]] = defaultdict(list)
    for job, pids in processes.items():
        seen: set[int] = set()
        for pid in pids:
            with contextlib.suppress(OSError):
                network = _namespace(pid, "net")
                if network == own:
                    on_host[job].append(pid)
                elif network not in seen:
                    seen.add(network)
                    held[job] += sum(netlink_buffers(pid).values())
    if on_host:
        waiting = {inode: size for inode, size in netlink_buffers(os.getpid()).items() if size}
        for job, pids in on_host.items() if waiting else ():
            inodes = {inode for pid in pids for inode in _sockets_of(pid)}
            held[job] += sum(waiting[inode] for inode in inodes & waiting.keys())
    return held


def netlink_buffers(pid: int) -> dict[int, int]:
    """Bytes that wait in netlink sockets of a process's network, by the sockets' inodes."""
    with open(f"/proc/{pid}/net/netlink") as file:
        rows = (line.split() for line in file)
        next(rows)
        return {int(row[9]): int(row[4]) for row in rows if len(row) >= 10}


def _sockets_of(pid: int) -> Iterator[int]:
    """The inodes of a process's sockets, those of threads with descriptors of their own too."""
    for thread in _listed(f"/proc/{pid}/task"):
        place = f"/proc/{pid}/task/{thread}/fd"
        for name in _listed(place):
            with contextlib.suppress(OSError):
                target = os.readlink(f"{place}/{name}")
                if target.startswith(_SOCKET):
                    yield int(target[len(_SOCKET) : -1])


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
