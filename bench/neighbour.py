"""What hostile jobs do to their neighbours: a table, with one row for each kind of attack.

A launcher of its own runs the hostile jobs, and beside them `true` again and again, as a neighbour
would. The table shows the longest turn of the launcher's one thread (while it lasts no job starts,
stops or times out) and what took most of it, how many turns were over the bound of 20 ms, the
neighbour's median and 99th percentile from request to end, what the kernel's own memory grew by
while the attack was at its height, the host's pseudo-terminals that the jobs hold, and how hostile
jobs ended that were not killed. Compare with the first row: it has the machine's noise.

    python -m bench.neighbour [NAME…] [--seconds=5]
"""

import argparse
import contextlib
import os
import select
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from attrs import evolve

from jobworker.config.settings import Settings
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits
from jobworker.sandbox.service.launch import start_launcher
from jobworker.sandbox.start.plan import Order
from jobworker.server.startup.preparation import policy_for
from jobworker.server.startup.state_directory import make_state_directory

MIB = 1 << 20
LIMITS = ScopeLimits(cpu_percent=100, memory_bytes=512 * MIB, pids=1024)
READY = b"ready\n"


class Attack(NamedTuple):
    """A hostile job: it says "ready" once it holds what it wants, and is killed or ends then."""

    what: str
    script: str
    jobs: int = 1
    limits: ScopeLimits = LIMITS
    network: str = "host"
    volume: bool = False
    wait_seconds: float = 60.0


_FILES = """
import os
count = 0
try:
    for directory in range(100):
        os.mkdir(f"d{directory}")
        for name in range(500):
            os.close(os.open(f"d{directory}/{name}", os.O_CREAT | os.O_WRONLY))
            count += 1
except OSError as error:
    print(error, flush=True)
"""
_EXTENTS = """
import os
file = os.open("/volumes/v/x", os.O_CREAT | os.O_RDWR)
for block in range(0, 24000, 2):
    os.pwrite(file, b"x" * 4096, block * 4096)
os.fsync(file)
"""
_PROCESSES = """
import os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def bomb():
    try:
        for _ in range(20000):
            if os.fork() == 0:
                signal.pause()
    except OSError:
        pass
bomb()
"""
_FORKS = """
import os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
try:
    for _ in range(8900):
        if os.fork() == 0:
            signal.pause()
except OSError:
    pass
for _ in range(8):
    if os.fork() == 0:
        while True:
            try:
                if os.fork() == 0:
                    os._exit(0)
            except OSError:
                pass
"""
_THREADS = """
import threading, time
threading.stack_size(32768)
try:
    for _ in range(20000):
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
except RuntimeError:
    pass
"""
_DESCRIPTORS = """
import os, resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
count = 0
try:
    while True:
        os.dup(0)
        count += 1
except OSError:
    pass
for where in ("fd", "fdinfo", "task/1/fd", "task/1/fdinfo"):
    for number in range(count):
        os.lstat(f"/proc/1/{where}/{number}")
"""
_MEMORY = """
held = bytearray(400 << 20)
for at in range(0, len(held), 4096):
    held[at] = 1
"""
_OOM = "held = bytearray(4 << 30)"
_TERMINALS = """
import os
held = []
try:
    while True:
        held.append(os.posix_openpt(os.O_RDWR | os.O_NOCTTY) if hasattr(os, "posix_openpt")
                    else os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))
except OSError as error:
    print(len(held), error, flush=True)
"""
NETLINK = """
import os, resource, socket, struct
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
def fill():
    held = []
    wrong = struct.pack("=IHHII", 4096, 0x7FFF, 1, 1, 0) + bytes(4080)
    try:
        while len(held) < 9000:
            held.append(one := socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
            one.bind((0, 0))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            for _ in range(200):
                one.send(wrong)
    except OSError:
        pass
    return held
os.fork()
held = fill()
"""
_DATAGRAMS = """
import socket
held = []
for _ in range(900):
    held.append(one := socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    one.bind(("127.0.0.1", 0))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        for _ in range(100):
            other.sendto(bytes(8000), one.getsockname())
"""
_LOCKS = """
import fcntl
held = []
for number in range(900):
    held.append(file := open(f"/workspace/{number}", "w"))
    for at in range(1000):
        fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * at)
"""
_TAIL = """
print("ready", flush=True)
import time
time.sleep(1000)
"""

ATTACKS: dict[str, Attack] = {
    "nothing": Attack("an idle job", "pass"),
    "files": Attack("50,000 files on the disk", _FILES, wait_seconds=240),
    "extents": Attack("a volume of 12,000 extents is removed", _EXTENTS, volume=True),
    "processes": Attack(
        "9,000 processes", _PROCESSES, limits=LIMITS._replace(pids=9_000, memory_bytes=4096 * MIB)
    ),
    "forks": Attack(
        "8,900 processes, and 8 that fork",
        _FORKS,
        limits=LIMITS._replace(pids=9_000, memory_bytes=4096 * MIB, cpu_percent=0),
    ),
    "threads": Attack("9,000 threads", _THREADS, limits=LIMITS._replace(pids=9_000)),
    "descriptors": Attack(
        "all descriptors, each looked at in four directories of /proc",
        _DESCRIPTORS,
        jobs=6,
        limits=LIMITS._replace(memory_bytes=2048 * MIB, cpu_percent=0),
    ),
    "memory": Attack("400 MiB of memory", _MEMORY, jobs=2),
    "oom": Attack("out of memory", _OOM, jobs=4),
    "terminals": Attack("all pseudo-terminals", _TERMINALS),
    "netlink": Attack(
        "netlink sockets with full buffers",
        NETLINK,
        limits=LIMITS._replace(memory_bytes=64 * MIB),
        network="none",
    ),
    "datagrams": Attack(
        "UDP sockets with full buffers",
        _DATAGRAMS,
        limits=LIMITS._replace(memory_bytes=64 * MIB),
        network="none",
    ),
    "locks": Attack("900,000 locks on files", _LOCKS, limits=LIMITS._replace(cpu_percent=0)),
    "networks": Attack("private networks", "pass", jobs=4, network="private"),
}


class Row(NamedTuple):
    """What one attack did."""

    longest_turn_ms: float
    slowest: str
    over_bound: int
    median_ms: float
    p99_ms: float
    kernel_mib: float
    terminals: int
    ended: str
    """How the hostile jobs ended before they were killed: "" where they held out."""


class Neighbourhood:
    """A launcher of its own with the default settings, and jobs in it."""

    def __init__(self, directory: Path) -> None:
        settings = Settings()
        settings = evolve(settings, worker=evolve(settings.worker, state_dir=str(directory)))
        make_state_directory(directory)
        self._launcher = start_launcher(policy_for(settings, directory))
        self._launcher.sock.setblocking(True)
        self._launcher.sock.settimeout(120)
        self._calls = self._jobs = 0
        self._ended: dict[int, channel.Message] = {}

    def ask(self, operation: str, **fields: object) -> tuple[channel.Message, list[int]]:
        """Ask the launcher for something: the reply and what came with it."""
        self._calls += 1
        channel.send(self._launcher.sock, {"id": self._calls, "op": operation, **fields})
        while True:
            received = channel.receive(self._launcher.sock)
            assert received is not None, "the launcher has left"
            if received[0].get("id") == self._calls:
                return received
            self._note(received[0])

    def _note(self, message: channel.Message) -> None:
        job = message.get("job")
        if message.get("event") == "exit" and isinstance(job, int):
            self._ended[job] = message

    def spawn(self, order: Order, limits: ScopeLimits) -> tuple[int, list[int]]:
        """Start a job: its id and its pipes."""
        self._jobs += 1
        told, pipes = self.ask("spawn", job=self._jobs, **order._asdict(), **limits._asdict())
        assert "ok" in told, told
        return self._jobs, pipes

    def end_of(self, job: int) -> channel.Message:
        """Wait for a job's end."""
        while job not in self._ended:
            received = channel.receive(self._launcher.sock)
            assert received is not None, "the launcher has left"
            self._note(received[0])
        return self._ended.pop(job)

    def neighbour(self) -> float:
        """Run `true` and forget it: seconds from the request to its end."""
        began = time.perf_counter()
        job, pipes = self.spawn(Order("neighbour", ("true",), {}, ""), LIMITS)
        end = self.end_of(job)
        seconds = time.perf_counter() - began
        assert end["code"] == 0, end
        channel.close_all(pipes)
        self.ask("remove", job=job)
        return seconds

    def attack(self, attack: Attack, seconds: float) -> Row:
        """Run the hostile jobs, end them, and look at what that did to the neighbour."""
        if attack.volume:
            told, _ = self.ask("volume.create", name="v", size_bytes=512 * MIB, thin=True)
            assert "ok" in told, told
        before, terminals = kernel_bytes(), terminals_in_use()
        self.ask("turns")
        order = Order(
            "hostile",
            ("python3", "-c", attack.script + _TAIL),
            {},
            "",
            network=attack.network,
            volumes=(("v", "/volumes/v"),) if attack.volume else (),
        )
        hostile = [self.spawn(order, attack.limits) for _ in range(attack.jobs)]
        times = self._meanwhile(lambda: _all_ready(hostile), attack.wait_seconds)
        times += self._meanwhile(lambda: all(job in self._ended for job, _ in hostile), seconds)
        most = kernel_bytes() - before
        held = terminals_in_use() - terminals
        ended = [job for job, _ in hostile if job in self._ended]
        causes = {_cause(self._ended[job]) for job in ended}
        for job, _ in hostile:
            if job not in self._ended:
                self.ask("kill", job=job)
        times += self._meanwhile(lambda: all(job in self._ended for job, _ in hostile), 60)
        for job, pipes in hostile:
            self.end_of(job)
            channel.close_all(pipes)
            self.ask("remove", job=job)
        times += self._meanwhile(lambda: False, 0.5)
        if attack.volume:
            self.ask("volume.remove", name="v")
        times += self._meanwhile(lambda: False, 0.5)
        times_of_turns = self.ask("turns")[0]["ok"]
        assert isinstance(times_of_turns, dict)
        return Row(
            times_of_turns["longest_ms"],
            times_of_turns["slowest"],
            times_of_turns["over_bound"],
            1000 * statistics.median(times),
            1000 * sorted(times)[int(0.99 * (len(times) - 1))],
            most / MIB,
            held,
            ", ".join(sorted(causes)),
        )

    def _meanwhile(self, over: Callable[[], bool], seconds: float) -> list[float]:
        """Run the neighbour until `over` or for so long: how long each run took."""
        until, times = time.monotonic() + seconds, [self.neighbour()]
        while time.monotonic() < until and not over():
            times.append(self.neighbour())
            time.sleep(0.005)
        return times

    def close(self) -> None:
        """End the launcher, and wait for it."""
        self._launcher.sock.close()
        self._launcher.process.wait(60)


def _cause(end: channel.Message) -> str:
    usage = end["usage"]
    assert isinstance(usage, dict)
    if usage["oom_kills"]:
        return "out of memory"
    number = end["signal"]
    return signal.Signals(number).name if isinstance(number, int) else f"exit {end['code']}"


def _all_ready(hostile: list[tuple[int, list[int]]]) -> bool:
    """Whether each hostile job has said so, or has ended."""
    return all(_is_ready(pipes[0]) for _, pipes in hostile)


_said: dict[int, bytes] = {}


def _is_ready(pipe: int) -> bool:
    while select.select([pipe], [], [], 0)[0]:
        piece = os.read(pipe, 65536)
        if not piece:
            return True
        _said[pipe] = _said.get(pipe, b"") + piece
    return _said.get(pipe, b"").endswith(READY)


def kernel_bytes() -> int:
    """What the kernel keeps for itself: slabs, vmalloc, and pages that no counter names."""
    with open("/proc/meminfo") as file:
        rows = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
    named = ("MemFree", "Buffers", "Cached", "SwapCached", "AnonPages", "PageTables")
    return rows["MemTotal"] - sum(rows[name] for name in (*named, "KernelStack", "SReclaimable"))


def terminals_in_use() -> int:
    """Pseudo-terminals of the whole host."""
    with open("/proc/sys/kernel/pty/nr") as file:
        return int(file.read())


@contextlib.contextmanager
def neighbourhood() -> Iterator[Neighbourhood]:
    """A launcher in a directory of its own."""
    directory = Path(tempfile.mkdtemp(prefix="jobworker-neighbour-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        made = Neighbourhood(directory / "state")
        try:
            yield made
        finally:
            made.close()
    finally:
        shutil.rmtree(directory)


def main() -> None:
    """Run the attacks that are asked for, all by default, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*ATTACKS, []])
    parser.add_argument("--seconds", type=float, default=5.0)
    asked = parser.parse_args()
    print(
        "| attack | longest turn, ms | over 20 ms | p50, ms | p99, ms | kernel, MiB | ptys | end |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with neighbourhood() as hood:
        for _ in range(20):
            hood.neighbour()
        for name in asked.names or ATTACKS:
            row = hood.attack(ATTACKS[name], asked.seconds)
            print(
                f"| {ATTACKS[name].what} | {row.longest_turn_ms:.1f} ({row.slowest}) | "
                f"{row.over_bound} | {row.median_ms:.1f} | {row.p99_ms:.1f} | "
                f"{row.kernel_mib:.0f} | {row.terminals} | {row.ended} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
