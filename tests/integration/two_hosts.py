"""A host and its neighbour on a cable, both made of network namespaces: run as a program.

What a job can reach of a network is tried where the network is known to the last address:

    peer 10.77.0.2 ──veth── host 10.77.0.1, 10.77.0.9, fd77::1, loopback ── service ── job

Servers at every address of the host greet whoever connects; so does the peer, with the address it
sees. The host's resolver is on its loopback, beside a server that is none; the name that it knows
is `peer.test`. Standard output gets what came of it all, as JSON.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import trio

from jobworker.cli.embedded import open_embedded
from jobworker.sandbox import syscalls as sc

from .wire import Wire, open_wire

PEER, HOST, SECOND, HOST_6 = "10.77.0.2", "10.77.0.1", "10.77.0.9", "fd77::1"
RESOLVER = "127.0.0.53"
NETWORKS = ("host", "none", "private")

CONNECT = """
import socket, sys
for place in sys.argv[1:]:
    host, port = place.rsplit("|", 1)
    try:
        with socket.create_connection((host, int(port)), 2) as reached:
            said = reached.recv(64).decode()
    except OSError as error:
        said = "refused"
    print(place, said, flush=True)
"""
DATAGRAM = """
import socket, sys
for place in sys.argv[1:]:
    host, port = place.rsplit("|", 1)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(1)
        try:
            s.setsockopt(*((41, 25) if ":" in host else (0, 11)), 1)  # be told of refusals: ip(7)
            s.sendto(b"?", (host, int(port)))
            said = s.recv(64).decode()
        except OSError as error:
            said = "refused"
    print(place, said, flush=True)
"""
LISTEN = """
import socket
listener = socket.create_server(("", 8642))
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    connection.sendall(b"inside")
    connection.close()
"""
RESOLVE = """
import socket
try: print(socket.gethostbyname("peer.test"))
except OSError: print("refused")
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Server(threading.Thread):
    """Greets over TCP and UDP at one address and port."""

    def __init__(self, address: str, port: int, greeting: str) -> None:
        super().__init__(daemon=True)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.greeting = greeting
        self.stream = socket.create_server((address, port), family=family, backlog=64)
        self.packets = socket.socket(family, socket.SOCK_DGRAM)
        self.packets.bind((address, port))
        threading.Thread(target=self._serve_packets, daemon=True).start()
        self.start()

    def run(self) -> None:
        while True:
            connection, (seen, *_) = self.stream.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(f"{self.greeting} {seen}".encode())

    def _serve_packets(self) -> None:
        while True:
            _, sender = self.packets.recvfrom(64)
            self.packets.sendto(f"{self.greeting} {sender[0]}".encode(), sender)


class Resolver(threading.Thread):
    """Answers every question with the peer's address: RFC 1035, section 4."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.packets = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.packets.bind((RESOLVER, 53))
        self.start()

    def run(self) -> None:
        while True:
            query, sender = self.packets.recvfrom(512)
            if len(query) < 18:  # a greeting that came to the wrong door
                continue
            end = query.index(b"\0", 12) + 5
            kind = struct.unpack_from("!H", query, end - 4)[0]
            head = query[:2] + struct.pack("!HHHHH", 0x8180, 1, int(kind == 1), 0, 0)
            answer = struct.pack("!HHHIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(PEER)
            self.packets.sendto(head + query[12:end] + answer * (kind == 1), sender)


def be_the_peer(ready: int) -> None:
    """In a process of its own: wait for the cable, then serve and try what is asked on stdin."""
    sc.unshare(sc.CLONE_NEWNET)
    os.write(ready, b"!")
    sys.stdin.readline()
    ip("link", "set", "lo", "up")
    ip("addr", "add", f"{PEER}/24", "dev", "v1")
    ip("link", "set", "v1", "up")
    Server(PEER, 7000, "peer")
    print("serving", flush=True)
    for place in sys.stdin:
        host, port = place.strip().rsplit("|", 1)
        try:
            with socket.create_connection((host, int(port)), 2) as reached:
                print(reached.recv(64).decode() or "refused", flush=True)
        except OSError:
            print("refused", flush=True)


class Peer:
    """The neighbour."""

    def __init__(self) -> None:
        ready, tell = os.pipe()
        code = f"from {__spec__.name} import be_the_peer; be_the_peer({tell})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[tell],
        )
        os.close(tell)
        assert os.read(ready, 1) == b"!"
        os.close(ready)

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Peer, dict[str, str]]]:
    """Go on as the host, with its cable to the peer: the peer, and every server by its place."""
    sc.unshare(sc.CLONE_NEWNET | sc.CLONE_NEWNS)
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(f"nameserver {RESOLVER}\noptions timeout:1 attempts:1\n")
        file.flush()
        os.chmod(file.name, 0o644)
        sc.mount(file.name, "/etc/resolv.conf", None, sc.MS_BIND)
        peer = Peer()
        try:
            ip("link", "set", "lo", "up")
            ip("link", "add", "v0", "type", "veth", "peer", "name", "v1")
            ip("link", "set", "v1", "netns", str(peer.process.pid))
            for address in (f"{HOST}/24", f"{SECOND}/24"):
                ip("addr", "add", address, "dev", "v0")
            ip("addr", "add", f"{HOST_6}/64", "dev", "v0", "nodad")
            ip("link", "set", "v0", "up")
            assert peer.ask("go") == "serving"
            Resolver()
            everywhere = ("127.0.0.1", "::1", HOST, SECOND, HOST_6, RESOLVER)
            places = {f"{PEER}|7000": "peer"}
            for port, address in enumerate(everywhere, 7001):
                Server(address, port, "host")
                places[f"{address}|{port}"] = "host"
            for port, address in ((7100, "0.0.0.0"), (7101, "::")):
                Server(address, port, "host")
                same = [each for each in everywhere if (":" in each) == (":" in address)]
                places |= {f"{each}|{port}": "host" for each in same}
            yield peer, places
        finally:
            peer.process.send_signal(signal.SIGKILL)
            peer.process.wait()


async def explore(wire: Wire, peer: Peer, places: dict[str, str]) -> dict[str, object]:
    """What each network reaches, resolves, and is reached at."""
    inner = [f"10.0.2.{last}|{port}" for last in (2, 3) for port in (53, *range(7000, 7007), 7100)]
    found: dict[str, object] = {"places": places}
    for network in NETWORKS:
        wanted = [*places, *(inner if network == "private" else ())]
        seen: dict[str, object] = {}
        for name, script in (("tcp", CONNECT), ("udp", DATAGRAM)):
            out, err, _ = await wire.run("python3", "-c", script, *wanted, network=network)
            seen[name] = dict(line.split(" ", 1) for line in out.splitlines())
            assert err == ""
        out, _, _ = await wire.run("python3", "-c", RESOLVE, network=network)
        seen["resolved"] = out.strip()
        seen["entered"] = await entered(wire, peer, network)
        found[network] = seen
    return found


async def entered(wire: Wire, peer: Peer, network: str) -> list[str]:
    """What peer and host get from a server inside a job, at every address that it might be at."""
    job = {"command": ["python3", "-c", LISTEN], "network": network}
    result = await wire.call("job.run", job=job, follow={})
    await wire.notes(result["subscription"]).receive()
    answers = [peer.ask(f"{address}|8642") for address in (HOST, SECOND, "10.0.2.100")]
    places = [f"{address}|8642" for address in (HOST, "127.0.0.1", "10.0.2.100")]
    command = [sys.executable, "-c", CONNECT, *places]
    done = await trio.run_process(command, capture_stdout=True)
    answers += [line.split(" ", 1)[1] for line in done.stdout.decode().splitlines()]
    await wire.call("job.stop", id=result["job"]["id"])  # type: ignore[index]
    return answers


async def main() -> None:
    """Try everything and tell."""
    directory = Path(tempfile.mkdtemp(prefix="jobworker-test-", dir="/var/tmp"))
    try:
        with two_hosts() as (peer, places):
            async with open_embedded(directory, {}) as service, open_wire(service) as wire:
                found = await explore(wire, peer, places)
    finally:
        shutil.rmtree(directory)
    print(json.dumps(found))


if __name__ == "__main__":
    trio.run(main)
