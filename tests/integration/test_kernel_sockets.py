"""What a job's sockets hold is bounded, where its control group does not count that, too."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.kernel_memory import connections as kernel_connections
from jobworker.sandbox.kernel_memory import measure as kernel_memory
from jobworker.sandbox.kernel_memory import search as kernel_search

from .conftest import child_of
from .test_kernel_memory import MIB, end_of, service  # noqa: F401 - a fixture
from .test_launcher import Service, make_policy  # noqa: F401 - a fixture

pytestmark = pytest.mark.alone

UNCOUNTED = """
import ctypes, resource, socket, struct, time
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
V4, V6 = socket.AF_INET, socket.AF_INET6
DATAGRAM, STREAM = socket.SOCK_DGRAM, socket.SOCK_STREAM
STAMPS = 1 << 1 | 1 << 4  # SOF_TIMESTAMPING_TX_SOFTWARE, SOFTWARE
DATA, held = bytes(60_000), []
connect = ctypes.CDLL(None).connect
def address(family):
    return ("127.0.0.1" if family == V4 else "::1", 0)
def of_udp(family, bound=True):
    to = socket.socket(family, DATAGRAM)
    to.bind(address(family))
    name = to.getsockname()
    held.append(to)
    if not bound:
        to.close()
    while True:
        held.append(one := socket.socket(family, DATAGRAM))
        one.setblocking(False)
        one.connect(name)
        yield one
def stamps(family):
    for one in of_udp(family):
        one.setsockopt(socket.SOL_SOCKET, 37, STAMPS)
        yield [one.send(DATA) for _ in range(3)]
def stamps_by_message(family):
    for one in of_udp(family):
        asked = [(socket.SOL_SOCKET, 37, struct.pack("i", 1 << 1))]
        one.setsockopt(socket.SOL_SOCKET, 37, 1 << 4)
        yield [one.sendmsg([DATA], asked) for _ in range(3)]
def refusals(family):
    for one in of_udp(family, bound=False):
        one.setsockopt(*((0, 11) if family == V4 else (41, 25)), 1)  # IP_RECVERR, IPV6_RECVERR
        for _ in range(300):
            try:
                one.send(DATA[:1000])
            except OSError:
                pass
        yield
def corks(family):
    for one in of_udp(family):
        yield one.send(DATA, socket.MSG_MORE)
def unbound(family, size=60_000, times=3):
    for one in of_udp(family):
        one.setsockopt(socket.SOL_SOCKET, 37, STAMPS)
        yield [one.send(DATA[:size]) for _ in range(times)]
        connect(one.fileno(), bytes(16), 16)  # to AF_UNSPEC
def options(kind, size=16_000):
    while True:
        held.append(one := socket.socket(V6, kind))
        option = struct.pack("NII", size, 99, 0) + bytes(size - 16)
        yield one.setsockopt(41, 6, option)  # IPV6_2292PKTOPTIONS
def reset(family):
    server = socket.socket(family)
    server.bind(address(family))
    server.listen()
    while True:
        held.append(one := socket.create_connection(server.getsockname()))
        other = server.accept()[0]
        one.setsockopt(socket.SOL_SOCKET, 37, STAMPS)
        for _ in range(20):
            one.send(DATA)
            other.recv(1 << 20)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        other.close()
        yield
def fill(of, most=4000):
    for number, _ in enumerate(of, start=1):
        if number == most:
            break
    print("full", flush=True)
    time.sleep(10)
"""
"""Sockets that are accepted, in order, and read where it matters, and hold what no group counts."""
READS = """
import resource, socket, time
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
held, data = [], bytes(60_000)
def pair(family, kind):
    to, one = socket.socket(family, kind), socket.socket(family, kind)
    to.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    if kind == socket.SOCK_STREAM:
        to.listen()
    one.connect(to.getsockname())
    one.setsockopt(socket.SOL_SOCKET, 37, 1 << 1 | 1 << 4)
    one.setblocking(False)
    to = to.accept()[0] if kind == socket.SOCK_STREAM else to
    to.setblocking(False)
    return one, to
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    held += [pair(family, kind) for family in (socket.AF_INET, socket.AF_INET6) for _ in range(200)]
end, taken, number = time.monotonic() + 4, 0, 0
def all_of(take):
    try:
        while data := take():
            yield len(data)
    except OSError:
        pass
while time.monotonic() < end:
    for one, to in held:
        try:
            one.send(data)
            one.send(data)
        except OSError:
            pass
        for _ in all_of(lambda: one.recvmsg(1 << 20, 1000, socket.MSG_ERRQUEUE)[0]):
            pass
        if (number := number + 1) % 3 == 0:
            taken += sum(all_of(lambda: to.recv(1 << 20)))
print(taken >> 20)
"""
"""800 sockets, both ways, that fill and are read at once: the group counts what waits."""
CORKS = """
import socket, sys
held = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(20)]
for one in held:
    one.connect(("127.0.0.1", 9))
    one.send(bytes(1000), socket.MSG_MORE)
print("runs", flush=True)
sys.stdin.read()
"""
HOLDS = """
import ctypes, fcntl, mmap, os, select, socket, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
number = 323 if os.uname().machine == "x86_64" else 282
faults = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)  # userfaultfd(2)
fcntl.ioctl(faults, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
def hold(call, *arguments):  # until the end, by a page that nobody fills
    memory = mmap.mmap(-1, 4096)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(faults, 0xC020AA00, bytearray(struct.pack("QQQQ", at, 4096, 1, 0)))
    arguments = [ctypes.c_void_p(at) if each is None else each for each in arguments]
    threading.Thread(target=call, args=arguments, daemon=True).start()
    assert select.select([faults], [], [], 20)[0]
    os.read(faults, 32)
server, one, epoll = socket.socket(), socket.socket(), select.epoll()
server.bind(("127.0.0.1", 0))
server.listen()
one.connect(server.getsockname())
epoll.register(os.eventfd(1), select.EPOLLIN)
locked = os.memfd_create("locked")
for at in range(10):
    fcntl.fcntl(locked, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 2 * at, 1, 0))
hold(libc.send, one.fileno(), None, 4096, 0)
hold(libc.epoll_wait, epoll.fileno(), None, 1, -1)
print("runs", flush=True)
sys.stdin.read()
os._exit(0)
"""
"""Locks of the kernel's that are held for ever: on one socket of TCP, and on an epoll instance."""


@pytest.mark.parametrize(
    ("hoard", "network"),
    [
        ("stamps(V4)", "none"),
        ("stamps_by_message(V6)", "host"),
        ("refusals(V4)", "host"),
        ("refusals(V6)", "none"),
        ("corks(V4)", "host"),
        ("corks(V6)", "none"),
        ("unbound(V6)", "none"),
        ("unbound(V4)", "host"),
        ("reset(V4)", "none"),
        # Slabs, not pages.
        ("unbound(V4, 1400, 80), 1500", "none"),
        ("unbound(V6, 1400, 80), 1500", "host"),
        ("options(DATAGRAM), 10_000", "none"),
        ("options(STREAM), 10_000", "host"),
    ],
)
def test_job_whose_sockets_hold_what_is_not_counted_ends_as_out_of_memory(
    service: Service,  # noqa: F811 - the fixture
    hoard: str,
    network: str,
) -> None:
    script = UNCOUNTED + f"fill({hoard})"
    end, text = end_of(service, 1, script, 64 * MIB, network)
    usage = end["usage"]
    assert isinstance(usage, dict)
    assert (end["signal"], usage["oom_kills"]) == (9, 1), (end, text)


@pytest.mark.parametrize(
    "little", ["unbound(V4, 1400, 1), 18_000", "options(DATAGRAM, 1500), 18_000"]
)
def test_job_whose_sockets_hold_little_is_not_ended_though_slabs_grow_for_them(
    service: Service,  # noqa: F811 - the fixture
    little: str,
) -> None:
    script = UNCOUNTED.replace("sleep(10)", "sleep(3)") + f"fill({little})"
    end, text = end_of(service, 1, script, 128 * MIB)
    assert (end["code"], text) == (0, "full\n"), end


@pytest.mark.parametrize("network", ["none", "host"])
def test_job_that_reads_what_it_is_sent_is_not_ended(
    service: Service,  # noqa: F811 - the fixture
    network: str,
) -> None:
    end, text = end_of(service, 1, READS, 256 * MIB, network)
    assert end["code"] == 0, (end, text)
    assert int(text) > 200, "many times what it may hold"


def test_search_ends_when_it_has_found_enough_in_sockets() -> None:
    program = [sys.executable, "-c", CORKS]
    with open_process(["unshare", "--pid", "--fork", "--kill-child", *program]) as process:
        found = kernel_search.search(process, {}, sockets_too=True)
        enough = found.in_sockets // 2
        early = kernel_search.search(process, {}, sockets_too=True, enough_bytes=enough)
    assert found.is_all
    assert 0 < enough < early.in_sockets < found.in_sockets
    assert not early.is_all


def as_message(search: Callable[[], kernel_search.SearchResult]) -> channel.Message:
    return search()._asdict()


def test_search_waits_for_no_lock_that_a_job_holds() -> None:
    event_loop, outcomes = EventLoop(), list[channel.Message]()
    with open_process(
        ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", HOLDS]
    ) as (process):
        search = partial(kernel_search.search, process, {}, sockets_too=True)
        forks = ForkServer(event_loop, {})
        searchers = Chores(event_loop, forks, at_once=1, waiting=0, unending=1)
        searchers.start(partial(as_message, search), outcomes.append)
        while not outcomes:
            event_loop.run_once()
        forks.close()
    (found,) = outcomes
    assert found.get("is_all"), found
    assert found["locks"] == 10 * kernel_memory.BYTES_PER_LOCK
    assert isinstance(found["in_sockets"], int)
    assert found["in_sockets"] > 0


def test_orphans_are_told_of_jobs_whose_ids_were_found() -> None:
    """A job that still prepares itself has the launcher's, and what is there is nobody's."""
    program = ["sh", "-c", "echo runs; exec cat"]
    command = ["unshare", "--pid", "--fork", "--kill-child"]
    with (
        open_process([*command, *program]) as preparing,
        open_process([*command, "--user", *program]) as ready,
    ):
        Path(f"/proc/{ready}/uid_map").write_text("0 3123456000 10")
        orphans = kernel_connections.measure({preparing: 7, ready: 8}).orphans
    assert 7 not in orphans
    assert 8 in orphans


@contextlib.contextmanager
def open_process(command: list[str]) -> Iterator[int]:
    """A command's one child, which runs until the end of the block."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"runs\n"
        yield child_of(process.pid)
