"""Programs that hoard memory of the kernel's, and what a host of cgroup v2 shows of them.

A job runs `script(KIND)`, and `Sight` looks meanwhile, from outside: at the job's group and at the
numbers of the whole host. Those tell what no group counts; "kernel" is all that is neither free nor
a page of a file or a process, and so holds the others.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from attrs import Factory, define

MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
PAGE_BYTES = os.sysconf("SC_PAGESIZE")

_HEAD = """
import errno, fcntl, os, resource, socket, struct, time
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
held, faults = [], set()
def fill(each, data, most=10_000):  # until it would have to wait
    each.setblocking(False)
    try:
        for _ in range(most):
            each.send(data)
    except OSError as error:
        faults.add(errno.errorcode[error.errno])
def full(seconds=5):
    print("took all of it", *sorted(faults), flush=True)
    time.sleep(seconds)
V4, V6, UNIX = (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_UNIX, "")
def datagrams(family, count):
    for _ in range(count):
        held.append(to := socket.socket(family[0], socket.SOCK_DGRAM))
        held.append(other := socket.socket(family[0], socket.SOCK_DGRAM))
        to.bind((family[1], 0))
        other.connect(to.getsockname())
        fill(other, bytes(8000), 40)  # those for which there is no room are dropped
    full()
def streams(family, count, accept=True, size=32_768, most=10_000, close=None, seconds=5):
    server = socket.socket(family[0])
    server.bind((family[1], 0))
    server.listen(4096)
    held.append(server)
    for _ in range(count):
        held.append(other := socket.socket(family[0]))
        other.connect(server.getsockname())
        if accept:
            held.append(server.accept()[0])
        fill(other, bytes(size), most)
        if close is not None:
            if close == "reset":
                other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            other.close()
            held.pop()
    full(seconds)
def pairs(kind, count):
    for _ in range(count):
        held.extend(socket.socketpair(socket.AF_UNIX, kind))
        fill(held[-1], bytes(8000))
    full()
def netlink(count):
    wrong = struct.pack("=IHHII", 4096, 0x7FFF, 1, 1, 0) + bytes(4080)
    for _ in range(count):
        held.append(one := socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
        one.bind((0, 0))
        fill(one, wrong, 30)  # each is answered by an error that repeats it
    full(60)
def locks(kind, count, each=500):
    for number in range(count // each):
        held.append(file := os.open(name := f"/workspace/{number}", os.O_RDWR | os.O_CREAT))
        os.unlink(name)  # an overlay has no O_TMPFILE here
        for at in range(each):
            fcntl.fcntl(file, kind, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 2 * at, 1, 0))
    full(60)
def names(count):  # of files that do not exist
    for number in range(count):
        try:
            os.stat(f"/workspace/{number:0200}")
        except FileNotFoundError:
            pass
    full()
def pipes(count):
    for _ in range(count):
        held.append(pipe := os.pipe())
        os.set_blocking(pipe[1], False)
        try:
            os.write(pipe[1], bytes(65_536))
        except OSError as error:
            faults.add(errno.errorcode[error.errno])
    full()
"""
_OFD_SETLK = 37  # fcntl.h; Python 3.11 has no name for it

_WAITING = "accept=False, size=60_000, most=1, seconds=60"

UNCOUNTED: Mapping[str, str] = {
    "netlink": "netlink(1000)",
    "posix_locks": "locks(fcntl.F_SETLK, 1_000_000)",
    "ofd_locks": f"locks({_OFD_SETLK}, 1_000_000)",
    "tcp_not_accepted": f"streams(V4, 3900, {_WAITING})",
    "tcp_closed": f"streams(V6, 3900, {_WAITING}, close='close')",
    "tcp_reset": f"streams(V4, 3900, {_WAITING}, close='reset')",
}
"""What no group counts: the service looks for it."""
KINDS: Mapping[str, str] = {
    **UNCOUNTED,
    "udp_v4": "datagrams(V4, 1200)",
    "udp_v6": "datagrams(V6, 1200)",
    "tcp_v4": "streams(V4, 1000)",
    "tcp_v6": "streams(V6, 1000)",
    "tcp_small": "streams(V4, 6000, size=65_536, most=1)",
    "unix_streams": "pairs(socket.SOCK_STREAM, 1200)",
    "unix_datagrams": "pairs(socket.SOCK_DGRAM, 1200)",
    "pipes": "pipes(20_000)",
    "names": "names(150_000)",
}
"""Each would take some 200 MiB, or more, if nothing bounded it."""


def script(kind: str) -> str:
    """The program; it says when it has taken all that it wants."""
    return f"# hoard of {kind}\n{_HEAD}{KINDS[kind]}\n"


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) > 1}


def host() -> dict[str, int]:
    """The whole host's, in bytes."""
    info = {name: size * 1024 for name, size in _table(Path("/proc/meminfo")).items()}
    sockets = 0
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields = rest.split()
        pairs = dict(zip(fields[::2], map(int, fields[1::2]), strict=True))
        sockets += pairs.get("mem", 0) * PAGE_BYTES if name != "FRAG" else pairs["memory"]
    pages = ("MemFree", "Buffers", "Cached", "AnonPages")  # what is left is the kernel's own
    return {
        "SUnreclaim": info["SUnreclaim"],
        "SReclaimable": info["SReclaimable"],
        "sockets": sockets,
        "kernel": info["MemTotal"] - sum(info[name] for name in pages),
    }


def group_of(pid: int) -> Path:
    """The control group of a process."""
    line = Path(f"/proc/{pid}/cgroup").read_text().strip()
    return CGROUPS / line.removeprefix("0::/")


@define(eq=False)
class Sight:
    """The most that was seen of each number."""

    before: Mapping[str, int] = Factory(host)
    on_host: dict[str, int] = Factory(dict)
    """Growth since `before`."""
    in_group: dict[str, int] = Factory(dict)

    def look(self, group: Path | None) -> None:
        """Raises OSError where the group has gone."""
        for name, size in host().items():
            self.on_host[name] = max(self.on_host.get(name, 0), size - self.before[name])
        if group is not None:
            stat = _table(group / "memory.stat")
            found = {name: stat.get(name, 0) for name in ("sock", "kernel", "slab")}
            found["current"] = int((group / "memory.current").read_text())
            for name, size in found.items():
                self.in_group[name] = max(self.in_group.get(name, 0), size)

    def __str__(self) -> str:
        def figures(sizes: Mapping[str, int]) -> str:
            return ", ".join(f"{name} {size / MIB:.0f}" for name, size in sizes.items())

        return f"most seen in MiB: group {figures(self.in_group)}; host +: {figures(self.on_host)}"
