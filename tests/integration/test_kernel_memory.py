"""Kernel memory that no control group counts is bounded all the same."""

import os
import re
from collections.abc import Callable, Iterator

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.launch import start_launcher
from jobworker.sandbox.policy import Policy

from .test_launcher import Service, make_policy  # noqa: F401 - a fixture

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
HIDDEN = NETLINK.replace(
    "fill(900)",
    "import ctypes, os, threading\n"
    "def alone():\n"
    "    assert ctypes.CDLL(None).unshare(0x400) == 0\n"  # CLONE_FILES
    "    fill(900)\n"
    "    time.sleep(60)\n"
    "threading.Thread(target=alone).start()\n"
    "time.sleep(60)\n",
)
LOCKS = """
import fcntl, struct, time
for number in range(1000):
    file = open(f"/workspace/{number}", "w")
    globals()[f"file{number}"] = file
    for at in range(1000):
        fcntl.fcntl(file, KIND, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 2 * at, 1, 0))
print("full", flush=True)
time.sleep(60)
"""
DATAGRAMS = """
import socket
held, taken = [], 0
for _ in range(600):
    held.append(one := socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    one.bind(("127.0.0.1", 0))
    other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for _ in range(100):
        other.sendto(bytes(8000), one.getsockname())
    other.close()
for one in held:
    one.setblocking(False)
    try:
        while True:
            taken += len(one.recv(9000))
    except OSError:
        pass
print(taken)
"""


@pytest.fixture
def service(make_policy: Callable[..., Policy]) -> Iterator[Service]:  # noqa: F811
    policy = make_policy()
    made = Service(start_launcher(policy), policy)
    yield made
    made.sock.close()
    assert made.leaves() == 0


@pytest.mark.parametrize(
    ("script", "network"),
    [
        (NETLINK, "none"),
        (NETLINK, "host"),
        (HIDDEN, "host"),
        (LOCKS.replace("KIND", "fcntl.F_SETLK"), "host"),
        (LOCKS.replace("KIND", "37"), "host"),  # F_OFD_SETLK
    ],
    ids=["netlink, own network", "netlink", "netlink of a thread", "locks", "locks of files"],
)
def test_job_that_hoards_kernel_memory_ends_as_out_of_memory(
    service: Service, script: str, network: str
) -> None:
    assert "ok" in service.spawn(1, "sleep", "60")[0]
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


def test_few_netlink_sockets_and_locks_end_nothing(service: Service) -> None:
    script = NETLINK.replace("fill(900)", "fill(4)").replace("60", "1")
    reply, pipes = service.spawn(1, "python3", "-c", script)
    assert "ok" in reply
    assert service.exit_of(1)["code"] == 0
    channel.close_all(pipes)


def test_datagrams_in_buffers_are_within_the_memory_limit(service: Service) -> None:
    def taken(limit: int) -> int:
        job = limit // MIB + 1
        reply, pipes = service.spawn(
            job, "python3", "-c", DATAGRAMS, network="none", memory_bytes=limit
        )
        assert "ok" in reply
        assert service.exit_of(job)["code"] == 0
        text = os.read(pipes[0], 100)
        channel.close_all(pipes)
        assert re.fullmatch(rb"\d+\n", text), text
        return int(text)

    free = taken(0)
    assert free > 40 * MIB, "the control: nothing bounds it"
    assert taken(16 * MIB) < 16 * MIB
