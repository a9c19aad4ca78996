"""A host and its neighbour on a cable, both made of network namespaces: run as a program.

What a job can reach of a network is tried where the network is known to the last address:

    peer 10.77.0.2 ──veth── host 10.77.0.1, 10.77.0.9, fd77::1, loopback ── service ── job

Servers at every address of the host greet whoever connects; so does the peer, with the address it
sees. The host's resolver is on its loopback, beside a server that is none; the name that it knows
is `peer.test`. Both have a witness, which takes down what a job has tried by `ways_out`. Standard
output gets what came of it all, as JSON.
"""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import trio

from jobworker.cli.worker.embedded_service import open_embedded
from jobworker.sandbox import syscalls as sc

from .wire import Wire, open_wire

PEER, HOST, SECOND, HOST_6 = "10.77.0.2", "10.77.0.1", "10.77.0.9", "fd77::1"
RESOLVER = "127.0.0.53"
SO_RCVBUFFORCE = 33
"""Of asm-generic/socket.h."""
LATER = ("10.77.0.33", "10.99.0.1")
"""Addresses that the host gets while a job runs."""
NOWHERE = (
    *("127.0.0.1", RESOLVER, "127.255.255.254", HOST, SECOND, "0.0.0.0", "::1", HOST_6, "::"),
    *("10.0.2.2", "10.0.2.3", "10.0.2.15", "10.0.2.255", "10.0.2.0"),
    *("10.77.0.255", "10.77.0.0", "255.255.255.255", "224.0.0.1", "239.77.0.1", "203.0.113.5"),
)
"""What a private network must not reach: a job tries all ways to each. The last is local by a
route alone."""
WITNESS, GATE = 7200, 7201
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
WAYS_OUT = Path(__file__).with_name("ways_out.py").read_text()
RESOLVE = """
import socket
try: print(socket.gethostbyname("peer.test"))
except OSError: print("refused")
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Server(threading.Thread):
    """Greets over TCP and UDP at one address and port."""

    def __init__(
        self, address: str, port: int, greeting: str, opened: threading.Event | None = None
    ) -> None:
        super().__init__(daemon=True)
        self.opened = opened
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
            if self.opened is not None:
                self.opened.wait()
            with connection, contextlib.suppress(OSError):
                connection.sendall(f"{self.greeting} {seen}".encode())

    def _serve_packets(self) -> None:
        while True:
            _, sender = self.packets.recvfrom(64)
            self.packets.sendto(f"{self.greeting} {sender[0]}".encode(), sender)


class Witness:
    """Takes down who sends or connects to one port at any address, and who pings."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            stream = socket.socket(family, socket.SOCK_STREAM)
            datagrams = [socket.socket(family, socket.SOCK_DGRAM, kind) for kind in (0, 136)]
            for sock in (stream, *datagrams):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((address, WITNESS))
            stream.listen(4096)
            self._follow(self._take_connection, stream)
            pings = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
            for sock in (*datagrams, socket.socket(family, socket.SOCK_RAW, pings)):
                self._follow(self._take_packet, sock)
            if family == socket.AF_INET:
                for own in (HOST, "127.0.0.1"):
                    joined = socket.inet_aton("239.77.0.1") + socket.inet_aton(own)
                    with contextlib.suppress(OSError):  # the peer has another address
                        datagrams[0].setsockopt(socket.IPPROTO_IP, 35, joined)

    def _follow(self, take: Callable[[socket.socket], None], sock: socket.socket) -> None:
        def go_on() -> None:
            while True:
                take(sock)

        # socket(7): thousands of packets come before a thread of a busy host takes the first.
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)

        threading.Thread(target=go_on, daemon=True).start()

    def _take_connection(self, sock: socket.socket) -> None:
        connection, _ = sock.accept()
        threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.seen.add(connection.recv(64).decode() or "tcp")
            return
        self.seen.add("tcp")

    def _take_packet(self, sock: socket.socket) -> None:
        heard = sock.recv(65_536)
        if sock.type == socket.SOCK_RAW:
            kind = heard[(heard[0] & 15) * 4 if sock.family == socket.AF_INET else 0]
            if kind in (0, 129):  # the outside's answer to a ping, which slirp4netns waits for
                return
        name = re.search(
            rb"(ping|raw) [!-~]+ [!-~]+" if sock.type == socket.SOCK_RAW else rb"[ -~]+", heard
        )
        if name is not None:
            self.seen.add(name[0].decode().strip())

    def told(self) -> list[str]:
        """What has been seen until now, all that has arrived included; seen no more."""
        deadline = time.monotonic() + 20
        for number in range(2):  # the second comes after all that was in the queues with the first
            mark = f"udp mark-{number} -"
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(mark.encode(), ("127.0.0.1", WITNESS))
            with socket.create_connection(("127.0.0.1", WITNESS)) as stream:
                stream.sendall(f"tcp mark-{number} -".encode())
            while not {mark, f"tcp mark-{number} -"} <= self.seen:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        found = sorted(word for word in self.seen if " mark-" not in word)
        self.seen.clear()
        return found


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
    witness, opened = Witness(), threading.Event()
    Server(PEER, GATE, "go", opened)
    print("serving", flush=True)
    for place in sys.stdin:
        if place in ("open\n", "shut\n"):
            (opened.set if place == "open\n" else opened.clear)()
            print("done", flush=True)
            continue
        if place == "told\n":
            print(json.dumps(witness.told()), flush=True)
            continue
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
            ip("route", "add", "local", "203.0.113.0/24", "dev", "lo")
            # slirp4netns may ping from here, so that only the wall is in the way.
            Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
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
    witness = Witness()
    for network in ("host", "private"):
        found[f"{network} by all ways"] = await by_all_ways(wire, peer, witness, network)
    return found


async def by_all_ways(wire: Wire, peer: Peer, witness: Witness, network: str) -> dict[str, object]:
    """What has reached host and peer of a job that tried all ways to all addresses."""
    gate = f"@{PEER}|{GATE}"
    words = (str(WITNESS), PEER, *NOWHERE, gate, *LATER, gate)
    job = {"command": ["python3", "-c", WAYS_OUT, *words], "network": network}
    result = await wire.call("job.run", job=job, follow={})
    notes, told = wire.notes(result["subscription"]), b""
    async for message in notes:
        params = message["params"]
        assert isinstance(params, dict)
        if message["method"] == "job.output_end":
            break
        told += base64.b64decode(params["data"])
        if b"waiting\n" in told and b"opened\n" not in told:
            told += b"opened\n"
            for address in LATER:
                ip("addr", "add", f"{address}/24", "dev", "v0")
            for _ in range(2):  # the launcher has seen it before it can have started another job
                await wire.run("true", network="none")
            assert peer.ask("open") == "done"
    assert peer.ask("shut") == "done"
    for address in LATER:
        ip("addr", "del", f"{address}/24", "dev", "v0")
    return {
        "tried": told.decode(errors="replace").splitlines(),
        "at the host": await trio.to_thread.run_sync(witness.told),
        "at the peer": json.loads(peer.ask("told")),
    }


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
