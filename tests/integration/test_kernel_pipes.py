"""Pages that pipes keep and that no control group counts are bounded all the same."""

import os
import sys

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.kernel_memory import pipes as kernel_pipes
from jobworker.sandbox.kernel_memory import search as kernel_search

from .test_kernel_memory import MIB, end_of, service  # noqa: F401 - a fixture
from .test_kernel_sockets import open_process
from .test_launcher import Service, make_policy  # noqa: F401 - a fixture

pytestmark = pytest.mark.alone

HOARDS = """
import ctypes, fcntl, os, resource, socket, threading, time
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
PIECE, ALL = 32768, 1 << 30
server, one = socket.socket(), socket.socket()
server.bind(("127.0.0.1", 0))
server.listen()
one.connect(server.getsockname())
other, _ = server.accept()
one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
held = []
def anonymous():
    held.extend(ends := os.pipe())
    return ends[1]
def named(name=f"/dev/shm/pipe-{os.getpid()}"):
    os.mkfifo(name)
    held.append(end := os.open(name, os.O_RDWR))
    os.unlink(name)
    return end
def make_larger(end):
    try:
        return fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 1 << 20) // 4096
    except OSError:  # a user may have so many slots, and two for each pipe beyond
        return fcntl.fcntl(end, fcntl.F_GETPIPE_SZ) // 4096
def splice(end, size):
    try:
        return os.splice(other.fileno(), end, size, flags=os.SPLICE_F_NONBLOCK)
    except BlockingIOError:  # a piece may have taken two slots
        return 0
def fill(make, size, move=splice):
    taken = 0
    while taken < ALL:
        end = make()
        for _ in range(make_larger(end) - 1):
            one.sendall(bytes(PIECE))
            left = PIECE - move(end, size)
            while left:
                left -= len(other.recv(left))
            taken += PIECE
def fill_by_sendfile(make, size):
    fill(make, size, lambda end, size: os.sendfile(end, other.fileno(), None, size))
def of_a_thread(work):
    def alone():
        assert ctypes.CDLL(None).unshare(0x400) == 0  # CLONE_FILES
        try:
            work()
        finally:
            time.sleep(60)
    threading.Thread(target=alone).start()
"""


@pytest.mark.parametrize(
    "hoard",
    [
        "fill(anonymous, PIECE)",
        "fill(anonymous, 1)",
        "fill(named, 1)",
        "fill_by_sendfile(anonymous, 1)",
        "of_a_thread(lambda: fill(anonymous, 1))",
    ],
)
def test_job_whose_pipes_keep_what_is_not_counted_ends_as_out_of_memory(
    service: Service,  # noqa: F811 - the fixture
    hoard: str,
) -> None:
    service.sock.settimeout(60)
    script = (
        f"{HOARDS}try:\n    {hoard}\nexcept OSError as error:\n    print(error)\ntime.sleep(60)"
    )
    end, text = end_of(service, 1, script, 64 * MIB)
    usage = end["usage"]
    assert isinstance(usage, dict)
    assert (end["signal"], usage["oom_kills"], end["want"]) == (9, 1, "kernel"), (end, text)


FULL = """
import os, sys
held = [os.pipe() for _ in range(200)]
for _, end in held:
    os.set_blocking(end, False)
    os.write(end, bytes(65536))
print("runs", flush=True)
sys.stdin.read()
"""


def test_pipes_are_asked_where_they_may_hold_more_than_the_limit() -> None:
    """A pipe that is empty is not asked, and one of several ends once."""
    script = FULL.replace("print", "held += [os.pipe(), held[0], (os.dup(held[1][0]), 0)]\nprint")
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", script]
    most = 200 * kernel_pipes.most_in_one()
    with open_process(command) as process:
        asked = kernel_search.search(process, {}, sockets_too=True, enough_bytes=most - 1)
        few = kernel_search.search(process, {}, sockets_too=True, enough_bytes=2 * most)
        others = kernel_search.search(process, {}, enough_bytes=most - 1)
    assert asked.in_pipes == 200 * 65_536
    assert asked.most_in_pipes == 200 * 16 * kernel_pipes.SLOT_BYTES
    assert (few.in_pipes, few.most_in_pipes, others.in_pipes) == (0, 0, 0)


def test_job_with_many_full_pipes_of_its_own_memory_goes_on(
    service: Service,  # noqa: F811 - the fixture
) -> None:
    """Beside one that gives reasons for searches."""
    reply, pipes = service.spawn(1, "python3", "-c", FULL, network="none", memory_bytes=128 * MIB)
    assert "ok" in reply
    assert os.read(pipes[0], 100) == b"runs\n"
    script = f"{HOARDS}try:\n    fill(anonymous, 1)\nfinally:\n    time.sleep(60)"
    assert end_of(service, 2, script, 64 * MIB)[0]["want"] == "kernel"
    assert "ok" in service.ask("usage", 1)[0]
    channel.close_all(pipes)
