"""Kernel memory that no control group counts is bounded all the same."""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.kernel_memory import measure as kernel_memory
from jobworker.sandbox.kernel_memory import search as kernel_search
from jobworker.sandbox.protocol.policy import LauncherPolicy
from jobworker.sandbox.service.launch import start_launcher

from .conftest import child_of, children_of
from .test_launcher import Message, Service, make_policy  # noqa: F401 - a fixture

pytestmark = pytest.mark.alone

MIB = 1 << 20

NETLINK = """
import socket, struct, time
WRONG = struct.pack("=IHHII", 4096, 0x7FFF, 1, 1, 0) + bytes(4080)
held = []
def fill(most):
    while len(held) < most:
        held.append(one := socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
        one.setblocking(False)
        one.bind((0, 0))
        try:
            for _ in range(1000):  # each is answered by an error that repeats it
                one.send(WRONG)
        except OSError:
            pass
fill(900)
print("full", flush=True)
time.sleep(60)
"""
"""Each socket's buffer takes some 200 KB at least: net.core.rmem_default."""
OF_A_THREAD = NETLINK.replace(
    "fill(900)",
    "import ctypes, os, threading\n"
    "def alone():\n"
    "    assert ctypes.CDLL(None).unshare(0x400) == 0\n"  # CLONE_FILES
    "    fill(900)\n"
    "    time.sleep(60)\n"
    "threading.Thread(target=alone).start()\n"
    "time.sleep(60)\n",
)
LEADERLESS = NETLINK.replace(
    "fill(900)",
    "import ctypes, threading\n"
    "threading.Thread(target=lambda: (fill(900), time.sleep(60))).start()\n"
    "ctypes.CDLL(None).pthread_exit(None)\n",  # a process lives on without its first thread
)
IN_FLIGHT = NETLINK.replace(
    "fill(900)",
    "pairs = []\n"
    "for _ in range(45):\n"
    "    pairs.append(socket.socketpair())\n"
    "    fill(20)\n"
    "    for one in held:\n"
    "        socket.send_fds(pairs[-1][0], [b'x'], [one.fileno()])\n"
    "        one.close()\n"
    "    held.clear()\n",
)
MANY = """
import os, resource, socket, struct, time
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
def many(use, count, each=10_000):
    for _ in range(count // each):
        if os.fork() == 0:
            held = []
            for _ in range(each):
                held.append(one := socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
                use(one)
            time.sleep(60)
    time.sleep(60)
WRONG = struct.pack("=IHHII", 512, 0x7FFF, 1, 1, 0) + bytes(496)
ALL = struct.pack("=IHHIIB", 200_000, 18, 0x301, 2, 0, 0) + bytes(199_983)  # RTM_GETLINK, a dump
def little(one):
    for _ in range(12):
        one.send(WRONG)
def request(one):  # with no room for the list, the kernel keeps the request
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    one.setblocking(False)
    try:
        for _ in range(4):
            one.send(WRONG)
        one.send(ALL)
    except OSError:
        pass
"""
"""Netlink sockets that hold little each, or what the kernel does not count as theirs."""
LOCKS = """
import ctypes, fcntl, os, resource, select, socket, struct, tempfile, threading, time
libc = ctypes.CDLL(None)
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
SETLK, OFD_SETLK = fcntl.F_SETLK, 37
held, pairs = [], [socket.socketpair()]
def on_disk():  # an overlay of Linux 6.1 has no O_TMPFILE
    file, name = tempfile.mkstemp(dir="/workspace")
    os.unlink(name)
    return file
def fill(hide=held.append, make=on_disk,
         kind=OFD_SETLK, count=1_000_000, each=500, last=60):
    for number in range(count // each):
        file = make()
        for at in range(number * each, (number + 1) * each):
            fcntl.fcntl(file, kind, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 2 * at, 1, 0))
        hide(file)
    print("full", flush=True)
    time.sleep(last)
def memory():
    os.ftruncate(file := os.memfd_create("locked"), 4096)
    return file
def epoll():  # its file is one that many descriptors of the host share
    with select.epoll() as one:
        return os.dup(one.fileno())
def in_shared_memory():
    file = os.open("/dev/shm", os.O_RDWR | os.O_TMPFILE)
    os.ftruncate(file, 4096)
    return file
libc.mmap.restype = ctypes.c_void_p
def mapped(file):
    assert libc.mmap(None, ctypes.c_size_t(4096), 1, 1, file, ctypes.c_long(0)) != 2**64 - 1
    os.close(file)
def in_flight(file):
    if len(held) % 100 == 99:
        pairs.append(socket.socketpair())
    held.append(0)
    socket.send_fds(pairs[-1][0], [b"x"], [file])
    os.close(file)
def of_a_thread(**how):
    def run():
        assert libc.unshare(0x400) == 0  # CLONE_FILES
        fill(**how)
    threading.Thread(target=run).start()
def share(work=lambda: time.sleep(60)):  # all descriptors, with another process
    if libc.syscall(CLONE, 0x400 | 17, 0, 0, 0, 0) == 0:  # CLONE_FILES | SIGCHLD
        work()
        os._exit(0)
def leaderless(**how):
    threading.Thread(target=fill, kwargs=how).start()
    libc.pthread_exit(None)
""".replace("CLONE, ", "56, " if os.uname().machine == "x86_64" else "220, ")
OF_ENDED_PROCESSES = """
for _ in range(200):
    share(lambda: fill(kind=SETLK, count=5000, last=0))
    os.wait()
time.sleep(60)
"""
UNACCEPTED = """
import socket, struct, time
held = []
def fill(family, address, close=False, reset=False, each=3900, size=60_000):
    for number in range(20 * each):
        if number % each == 0:
            held.append(server := socket.socket(family))
            server.bind((address, 0))
            server.listen(4096)
        other = socket.socket(family)
        other.connect(server.getsockname())
        other.setblocking(False)
        if size:
            other.send(bytes(size))
        if reset:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if close or reset:
            other.close()
        else:
            held.append(other)
        if number * max(size, 4096) > 400 << 20:
            break
    print("full", flush=True)
    time.sleep(60)
import resource
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
"""
"""Connections that nobody accepts hold what they have received, and are in no control group."""
BUFFERS = """
import resource, socket, time
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
V4, V6, UNIX = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
def address(family):
    return ("127.0.0.1" if family == V4 else "::1", 0)
def datagrams(family):
    to, other = socket.socket(family, DATAGRAM), socket.socket(family, DATAGRAM)
    to.bind(address(family))
    other.connect(to.getsockname())
    return other, to
def streams(family):
    if family == UNIX:
        return socket.socketpair()
    server, other = socket.socket(family, STREAM), socket.socket(family, STREAM)
    server.bind(address(family))
    server.listen()
    other.connect(server.getsockname())
    return other, server.accept()[0]
held, sent = [], 0
for _ in range(400):
    held.append(pair := make(family))
    for each in pair:
        each.setblocking(False)
    try:
        for _ in range(100):
            sent += pair[0].send(bytes(8000))
    except OSError:
        pass
if held[0][1].type == DATAGRAM:
    sent = 0  # those that found no room were dropped
    for _, to in held:
        try:
            while data := to.recv(9000):
                sent += len(data)
        except OSError:
            pass
print(sent)
"""
"""What waits on either side of connections, or at the receiver of datagrams."""


@pytest.fixture
def service(make_policy: Callable[..., LauncherPolicy]) -> Iterator[Service]:  # noqa: F811
    policy = make_policy()
    made = Service(start_launcher(policy), policy)
    yield made
    made.sock.close()
    assert made.leaves() == 0


@pytest.mark.parametrize(
    ("script", "network"),
    [
        (NETLINK, "none"),
        (LEADERLESS, "none"),
        (OF_A_THREAD, "host"),
        (IN_FLIGHT, "host"),
        (MANY + "many(little, 100_000)", "host"),
        (MANY + "many(lambda one: None, 50_000)", "host"),
        (MANY + "many(lambda one: None, 50_000)", "none"),
        (MANY + "many(request, 5000, each=1000)", "host"),
        (MANY + "many(request, 5000, each=1000)", "none"),
        (LOCKS + OF_ENDED_PROCESSES, "none"),
        (UNACCEPTED + "fill(socket.AF_INET, '127.0.0.1')", "none"),
        (UNACCEPTED + "fill(socket.AF_INET6, '::1', close=True)", "none"),
        (UNACCEPTED + "fill(socket.AF_INET, '127.0.0.1', reset=True)", "none"),
        (UNACCEPTED + "fill(socket.AF_INET, '127.0.0.1', close=True)", "host"),
        (UNACCEPTED + "fill(socket.AF_INET, '127.0.0.1', reset=True)", "host"),
        (UNACCEPTED + "fill(socket.AF_INET, '127.0.0.1', reset=True, size=0)", "none"),
    ],
    ids=[
        "netlink, own network",
        "netlink, own network, first thread ended",
        "netlink of a thread",
        "netlink in flight",
        "netlink, many sockets",
        "netlink, empty sockets",
        "netlink, empty sockets, own network",
        "requests over netlink",
        "requests over netlink, own network",
        "locks of ended processes",
        "connections not accepted",
        "connections not accepted, closed, IPv6",
        "connections not accepted, reset",
        "connections not accepted, closed, host's network",
        "connections not accepted, reset, host's network",
        "connections not accepted, reset, empty",
    ],
)
def test_job_that_hoards_kernel_memory_ends_as_out_of_memory(
    service: Service, script: str, network: str
) -> None:
    service.sock.settimeout(60)  # a busy machine fills slowly
    assert "ok" in service.spawn(1, "sleep", "600")[0]
    reply, pipes = service.spawn(2, "python3", "-c", script, network=network)
    assert "ok" in reply
    end = service.exit_of(2)
    channel.close_all(pipes)
    usage = end["usage"]
    assert isinstance(usage, dict)
    assert (end["signal"], usage["oom_kills"]) == (9, 1), end
    assert "ok" in service.ask("kill", 1)[0], "the other job lives"
    other = service.exit_of(1)["usage"]
    assert isinstance(other, dict)
    assert other["oom_kills"] == 0


FEW = 6000
HIDDEN = {  # by where the search, too, must find them
    "of a thread": "of_a_thread()",
    "first thread ended": "leaderless(kind=SETLK)",
    "mapped": "fill(mapped, in_shared_memory)",
    "in flight": "fill(in_flight)",
    "of an ended process": "share(lambda: fill(kind=SETLK, last=0)); time.sleep(60)",
    "memory": "fill(make=memory)",
    "memory of a shared table": "share(); fill(make=memory)",
    "memory, mapped": "fill(mapped, memory)",
    "memory, in flight": "fill(in_flight, memory)",
    "memory, of epolls": "fill(make=epoll)",
}
"""Where a job hides locks; memory has no device of the job's own."""


@pytest.mark.parametrize("names", [list(HIDDEN)[:3], list(HIDDEN)[3:6], list(HIDDEN)[6:]])
def test_locks_are_found_wherever_jobs_hide_them(
    service: Service, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_memory, "_SHORT_BYTES", 50 * FEW)
    monkeypatch.setattr(kernel_memory, "_SAMPLES", 40)
    monkeypatch.setattr(kernel_memory, "LOCKS_SECONDS", 20)
    with open("/proc/locks") as file:  # a million of another test's job may still be going
        patience = time.monotonic() + 60
        while os.pread(file.fileno(), 1, kernel_memory._SHORT_BYTES):
            assert time.monotonic() < patience
            time.sleep(0.1)
    pids, outputs = {}, []
    for job, name in enumerate(names, start=1):
        script = LOCKS.replace("1_000_000", str(FEW)) + HIDDEN[name]
        reply, pipes = service.spawn(job, "python3", "-c", script, network="none")
        started = reply["ok"]
        assert isinstance(started, dict)
        pids[_outside(service, started["pid"])] = job
        outputs.append(pipes)
    for pipes in outputs:
        assert os.read(pipes[0], 100) == b"full\n", os.read(pipes[1], 1000)
        channel.close_all(pipes)

    with open("/proc/locks") as file:
        measured = kernel_memory.measure_locks(file.fileno(), pids)
    bytes_each = FEW * kernel_memory.BYTES_PER_LOCK
    for name, (pid, job) in zip(names, pids.items(), strict=True):
        has_device = not name.startswith("memory")
        assert (measured.held.get(job, 0) > bytes_each // 2) == has_device, (name, measured.held)
        found = kernel_search.search(pid, measured.unknown)
        assert found.is_all
        assert (found.in_flight > 0) == name.endswith("in flight"), (name, found)
        if "mapped" not in name and "flight" not in name:
            assert found.locks == bytes_each, (name, found, "each is counted once")
        elif name == "memory, mapped":
            assert found.locks > bytes_each // 2, found
    monkeypatch.setattr(kernel_search, "SEARCH_SECONDS", 0)
    assert not any(kernel_search.search(pid, {}).is_all for pid in pids)


def test_job_with_mounts_below_a_name_that_is_no_text_is_measured(service: Service) -> None:
    """Their paths are in its mountinfo."""
    script = (
        "import os, time; os.rename('/etc', b'/\\xff'); print('full', flush=True); time.sleep(60)"
    )
    reply, pipes = service.spawn(1, "python3", "-c", script, network="none")
    started = reply["ok"]
    assert isinstance(started, dict)
    assert os.read(pipes[0], 100) == b"full\n", os.read(pipes[1], 1000)
    channel.close_all(pipes)
    pid = _outside(service, started["pid"])
    assert b"/\xff/" in Path(f"/proc/{pid}/mountinfo").read_bytes()
    devices = kernel_memory._own_devices({pid: 7}, kernel_memory.tell_nobody)
    assert 7 in devices.values()


@pytest.mark.parametrize(("network", "can_ask"), [("none", True), ("host", False)])
def test_netlink_sockets_are_asked_themselves_what_they_hold(
    service: Service, monkeypatch: pytest.MonkeyPatch, network: str, *, can_ask: bool
) -> None:
    """The host's list takes too long where a job makes it long; it has none of another network.

    It is read for those of a thread's own table before Linux 6.9.
    """
    script = NETLINK.replace("fill(900)", "fill(4)")
    reply, pipes = service.spawn(1, "python3", "-c", script, network=network)
    started = reply["ok"]
    assert isinstance(started, dict)
    assert os.read(pipes[0], 100) == b"full\n", os.read(pipes[1], 1000)
    pid = _outside(service, started["pid"])
    if not can_ask:
        monkeypatch.setattr(os, "pidfd_open", _refuse)
    found = kernel_search.search(pid, {})
    channel.close_all(pipes)
    assert found.is_all
    assert found.netlink > 4 * 100_000


def _refuse(_pid: int, _flags: int = 0) -> int:
    raise OSError(errno.EINVAL, "this is no process's first thread")


def _outside(service: Service, pid: int) -> int:
    """The pid that a job's first process has here, not in the launcher's namespace."""
    launcher = child_of(service.process.pid)
    for child in children_of(launcher):
        with suppress(OSError):  # it has just been collected
            found = re.search(r"NSpid:\t(.*)", Path(f"/proc/{child}/status").read_text())
            if found is not None and str(pid) in found[1].split()[-2:-1]:
                return child
    raise AssertionError("it has ended")


def test_few_netlink_sockets_and_locks_end_nothing(service: Service) -> None:
    script = NETLINK.replace("fill(900)", "fill(4)").replace("60", "1")
    reply, pipes = service.spawn(1, "python3", "-c", script)
    assert "ok" in reply
    assert service.exit_of(1)["code"] == 0
    channel.close_all(pipes)


@pytest.mark.parametrize(
    ("kind", "beyond"),
    [
        ("datagrams(V4)", 0),
        ("datagrams(V6)", 0),
        ("streams(V4)", kernel_memory.BOUND_BYTES),
        ("streams(V6)", kernel_memory.BOUND_BYTES),
        ("streams(UNIX)", 0),
    ],
)
def test_what_waits_in_buffers_of_sockets_is_within_the_memory_limit(
    service: Service, kind: str, beyond: int
) -> None:
    def held(limit: int) -> int:
        """How much a job holds; 0 where it ended as out of memory."""
        job, script = limit // MIB + 1, BUFFERS.replace("make(family)", kind)
        end, text = end_of(service, job, script, limit)
        if end["signal"] == 9:
            assert end["want"] == "limit"
            return 0
        assert end["code"] == 0, text
        return int(text)

    assert held(0) > 35 * MIB, "the control: nothing bounds it"
    assert held(16 * MIB) < 16 * MIB + beyond


@pytest.mark.parametrize("family", ["V4", "V6"])
def test_job_whose_connections_hold_more_than_the_limit_ends_as_out_of_memory(
    service: Service, family: str
) -> None:
    """The kernel lets each have a piece, of 64 KB here, however many there are."""
    script = BUFFERS.replace("make(family)", f"streams({family})")
    script = script.replace("range(400)", "range(6000)").replace("8000", "65536")
    end, text = end_of(service, 1, script.replace("print(", "time.sleep(60); print("), 64 * MIB)
    usage = end["usage"]
    assert isinstance(usage, dict)
    assert (end["signal"], usage["oom_kills"]) == (9, 1), (end, text)


def end_of(
    service: Service, job: int, script: str, limit: int, network: str = "none"
) -> tuple[Message, str]:
    """Run a script to its end: that, and what it wrote."""
    reply, pipes = service.spawn(job, "python3", "-c", script, network=network, memory_bytes=limit)
    assert "ok" in reply
    end = service.exit_of(job)
    text = b"".join(os.read(pipe, 10_000) for pipe in pipes).decode()
    channel.close_all(pipes)
    return end, text
