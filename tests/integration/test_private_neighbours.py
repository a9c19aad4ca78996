"""`--network=private`: a job cannot fill the kernel's tables of neighbours, one for all."""

import ast
import base64
import itertools
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from jobworker.sandbox import syscalls as sc

from .wire import Wire

pytestmark = pytest.mark.alone

MANY_NEIGHBOURS = Path(__file__).with_name("many_neighbours.py").read_text()
EACH = 15
"""Neighbours that are wanted at a time: entries of this test stay for some seconds."""
WAYS = (
    *("datagrams", "source-routes", "connections", "groups", "loopback"),
    *("datagrams-6", "connections-6", "groups-6"),
)


class Elsewhere:
    """A network namespace with a cable, in a thread of its own: the tables are the host's."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._numbers = itertools.count(1)
        self._thread.submit(self._enter).result()

    def close(self) -> None:
        """Let go of the namespace."""
        self._thread.shutdown()

    def new_neighbours(self) -> dict[str, int]:
        """Ask for some neighbours that nobody asked for before: how many the kernel has made."""
        return self._thread.submit(self._ask).result()

    def _enter(self) -> None:
        sc.unshare(sc.CLONE_NEWNET)
        for words in (
            "link add v0 type veth peer name v1",
            "addr add 198.18.0.1/16 dev v0",
            "addr add fd78::1/64 dev v0 nodad",
            "link set v0 up",
            "link set v1 up",
        ):
            subprocess.run(["ip", *words.split()], check=True)

    def _ask(self) -> dict[str, int]:
        wanted = []
        for _ in range(EACH):
            high, low = divmod(next(self._numbers), 250)
            wanted += [f"198.18.{high + 1}.{low + 1}", f"fd78::{high + 1:x}:{low + 1:x}"]
        for address in wanted:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as sock, suppress(OSError):
                sock.sendto(b"x", (address, 9))
        told = subprocess.run(
            ["ip", "-j", "neigh", "show", "dev", "v0"], check=True, capture_output=True
        )
        there = {entry["dst"] for entry in json.loads(told.stdout)}
        made = [address for address in wanted if address in there]
        return {
            "IPv4": sum(":" not in address for address in made),
            "IPv6": sum(":" in address for address in made),
        }


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    made = Elsewhere()
    yield made
    made.close()


@asynccontextmanager
async def flood(wire: Wire, way: str) -> AsyncIterator[dict[str, int]]:
    """A job that asks for neighbours while the block lasts: the kernel's answers at its end."""
    command = ["python3", "-c", MANY_NEIGHBOURS, way]
    result = await wire.call("job.run", job={"command": command, "network": "private"}, follow={})
    notes, told = wire.notes(result["subscription"]), b""
    answers: dict[str, int] = {}

    async def read_until(line: bytes) -> None:
        nonlocal told
        while line not in told:
            params = (await notes.receive())["params"]
            assert isinstance(params, dict)
            assert "data" in params, (told, params)
            told += base64.b64decode(params["data"])

    await read_until(b"flooding\n")
    yield answers
    await wire.call("job.stop", id=result["job"]["id"])  # type: ignore[index]
    await read_until(b"}\n")
    answers.update(ast.literal_eval(told.decode().splitlines()[-1]))


@pytest.mark.parametrize("way", WAYS)
async def test_neighbours_are_to_be_had_while_a_job_asks_for_many(
    admin: Wire, elsewhere: Elsewhere, way: str
) -> None:
    before = elsewhere.new_neighbours()
    async with flood(admin, way) as answers:
        found = []
        for _ in range(2):
            await trio.sleep(0.1)
            found.append(elsewhere.new_neighbours())
    assert before == {"IPv4": EACH, "IPv6": EACH}, "the control"
    assert found == [before, before], answers
    assert sum(answers.values()) > 3_000, answers


async def test_job_cannot_change_its_neighbours(admin: Wire) -> None:
    script = """
cat /proc/net/arp /proc/net/if_inet6
for setting in ipv4/neigh/tap0/mcast_solicit ipv6/conf/tap0/disable_ipv6; do
    echo 3 > /proc/sys/net/$setting || echo refused
done
ip neigh replace 10.0.2.2 lladdr 52:55:0a:00:02:09 dev tap0 || echo refused
ip neigh add 10.0.2.50 lladdr 52:55:0a:00:02:09 dev tap0 || echo refused
ip ntable change name arp_cache dev tap0 mcast_probes 3 || echo refused
ip link set tap0 arp off || echo refused
cat /proc/net/arp
"""
    out, err, _ = await admin.run("sh", "-c", script, network="private")
    words = [line.split() for line in out.splitlines()]
    neighbours = {tuple(each) for each in words if each[-1] == "tap0"}
    assert neighbours == {
        (f"10.0.2.{last}", "0x1", "0x6", f"52:55:0a:00:02:0{last}", "*", "tap0") for last in (2, 3)
    }, "permanent"
    assert out.count("refused") == 6, (out, err)


async def test_neighbour_that_is_not_there_is_refused_at_once(admin: Wire) -> None:
    script = """
import socket, time
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    begun = time.monotonic()
    try:
        socket.socket(socket.AF_INET, kind).connect(("10.0.2.50", 80))
    except OSError as error:
        print(error.strerror, time.monotonic() - begun < 1)
"""
    out, err, _ = await admin.run("python3", "-c", script, network="private")
    assert out == "Network is unreachable True\n" * 2, err
