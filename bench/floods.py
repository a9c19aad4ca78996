"""The floods of `bench.fairness`: clients that ask for much, send rubbish, or take nothing back.

    python -m bench.floods NAME ADDRESS CERTS SECONDS

Prepares what the flood needs, prints "ready" and floods for so long; then it prints how much it
has asked for (requests, pings, connects, pieces), and is gone without a goodbye.
"""

import json
import os
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

import trio

from jobworker.config.settings import FIRST_UID
from jobworker.tls_stream import TLSStream

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Protocol: jobworker.v1\r\n\r\n"
)
CONTINUATION, TEXT, PING = 0, 1, 9
MIB = 1 << 20
CONNECTIONS = 4
STANDING_SECONDS = 0.1
PROCESSORS = "JOBWORKER_BENCH_FLOOD_PROCESSORS"
"""Names, in the environment, the processors that a flood is to keep to; the machine's else."""
LARGE = {f"V{n}": "x" * 30 for n in range(20_000)}
"""Nearly a megabyte of variables."""
LONG_LOG = """
import os
for _ in range(50000):
    os.write(1, b"out\\n"); os.write(2, b"err\\n")
"""


def frame(opcode: int, payload: bytes) -> bytes:
    """A frame whose mask is of zeros."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65_536:
        length = b"\xfe" + struct.pack("!H", size)
    else:
        length = b"\xff" + struct.pack("!Q", size)
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


def unfinished(whole: bytes) -> bytes:
    """The same frame as a part of a message that goes on."""
    return bytes([whole[0] & 0x7F]) + whole[1:]


def request(number: int, method: str, params: object) -> bytes:
    """A call, in its frame."""
    call = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
    return frame(TEXT, json.dumps(call).encode())


class Peer:
    """One upgraded connection."""

    def __init__(self, stream: TLSStream) -> None:
        self.stream = stream
        self._held = bytearray()
        self._buffer = memoryview(bytearray(MIB))
        self._numbers = count(1)

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        await self.stream.send_all(data)

    async def take(self) -> tuple[int, bytes]:
        """The next frame. Raises EOFError."""
        held = self._held
        while True:
            start = {126: 4, 127: 10}.get(held[1] & 0x7F, 2) if len(held) > 1 else 2
            if len(held) >= max(2, start):
                size = held[1] & 0x7F
                if start > 2:
                    size = int.from_bytes(held[2:start], "big")
                if len(held) >= start + size:
                    break
            taken = await self.stream.receive_into(self._buffer)
            if not taken:
                raise EOFError
            held += self._buffer[:taken]
        opcode, payload = held[0] & 15, bytes(memoryview(held)[start : start + size])
        del held[: start + size]
        return opcode, payload

    async def call(self, method: str, **params: object) -> dict[str, object]:
        """Call, and wait for the reply, refusal or not; what else comes is passed over."""
        number = next(self._numbers)
        await self.send(request(number, method, params))
        while True:
            opcode, payload = await self.take()
            if opcode == TEXT and not payload.startswith(b'{"jsonrpc":"2.0","method"'):
                reply = json.loads(payload)
                if reply["id"] in (number, None):
                    return dict(reply)

    async def run(self, *command: str, **spec: object) -> int:
        """Start a job: its id."""
        reply = await self.call("job.run", job={"command": list(command), **spec})
        return int(reply["result"]["job"]["id"])  # type: ignore[index]


class Target:
    """The service that is flooded, and how much was asked of it."""

    def __init__(self, address: str, certs: Path) -> None:
        host, port = address.rsplit(":", 1)
        self.host, self.port = host, int(port)
        self.asked = 0
        self.context = ssl.create_default_context(cafile=certs / "ca-cert.pem")
        self._certs = certs
        self.be("admin-client")

    def be(self, name: str) -> None:
        """Show that certificate from now on."""
        certificate, key = (self._certs / f"{name}-{each}.pem" for each in ("cert", "key"))
        self.context.load_cert_chain(certificate, key)

    async def dial(self, buffer: int | None = None) -> trio.SocketStream:
        """A TCP connection, which takes little where `buffer` is small."""
        made = trio.socket.socket()
        if buffer is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        await made.connect((self.host, self.port))
        return trio.SocketStream(made)

    @asynccontextmanager
    async def peer(self, buffer: int | None = None) -> AsyncIterator[Peer]:
        """Connect and upgrade."""
        stream = TLSStream(await self.dial(buffer), self.context, server_name=self.host)
        try:
            await stream.do_handshake()
            await stream.send_all(UPGRADE)
            head = b""
            while b"\r\n\r\n" not in head:
                data = await stream.receive_some()
                if not data:
                    raise EOFError
                head += data
            yield Peer(stream)
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()

    async def repeat(self, method: str, *variants: dict[str, object]) -> None:
        """Call again and again, each of the variants by turns, on one connection."""
        async with self.peer() as peer:
            while True:
                for params in variants:
                    await peer.call(method, **params)
                    self.asked += 1


Stage = Callable[[], Awaitable[None]]


async def _on_each(work: Callable[[], Awaitable[None]], connections: int = CONNECTIONS) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(work)


async def large_parameters(target: Target) -> Stage:
    """Requests of a megabyte that are planned, and such as are refused."""
    variants: list[dict[str, object]] = [
        {"job": {"command": ["true"], "environment": LARGE}},
        {"job": {"command": ["true", *["a"] * 16_000]}},
        {"job": {"command": ["true"], "cpu_cores": ",".join(["0-8191"] * 146)}},
        {"x": [{}] * 99_000},
    ]
    return lambda: _on_each(lambda: target.repeat("job.plan", *variants))


async def _large_jobs(target: Target, number: int) -> list[int]:
    async with target.peer() as peer:
        return [await peer.run("sleep", "600", environment=LARGE) for _ in range(number)]


async def large_records(target: Target) -> Stage:
    """The whole record, a megabyte, of one job after the other."""
    jobs = await _large_jobs(target, 10)
    variants: list[dict[str, object]] = [{"id": job} for job in jobs]
    return lambda: _on_each(lambda: target.repeat("job.status", *variants))


async def searches(target: Target) -> Stage:
    """Searches by labels that nobody has, and by two that nobody has together."""

    async def search() -> None:
        async with target.peer() as peer:
            while True:
                await peer.call("job.list", labels={"nobody": "has"}, limit=1000)
                before: object = None
                while True:
                    params = {"labels": {"x": "a", "y": "b"}, "limit": 1000, "before": before}
                    reply = await peer.call("job.list", **params)
                    target.asked += 1
                    result = reply["result"]
                    assert isinstance(result, dict)
                    if (before := result["next"]) is None:
                        break

    return lambda: _on_each(search)


async def tails(target: Target) -> Stage:
    """The last lines of a job that wrote 100,000 by turns to both streams."""
    async with target.peer() as peer:
        job = await peer.run("python3", "-c", LONG_LOG)
        await peer.call("job.wait", id=job)

    async def ask() -> None:
        async with target.peer() as peer:
            while True:
                for wanted in (
                    {"tail_lines": 2_147_483_648},
                    {"tail_lines": 90_000},
                    {"tail_lines": 3, "streams": ["stderr"]},
                ):
                    delivery = {"encoding": "binary", "credit_bytes": 1}
                    reply = await peer.call("job.log", id=job, delivery=delivery, **wanted)
                    result = reply["result"]
                    assert isinstance(result, dict)
                    await peer.call("job.unfollow", subscription=result["subscription"])
                    target.asked += 1

    return lambda: _on_each(ask)


async def lists(target: Target) -> Stage:
    """Full pages from the newest job to the oldest, large records among them."""
    await _large_jobs(target, 10)

    async def read() -> None:
        async with target.peer() as peer:
            before: object = None
            while True:
                reply = await peer.call("job.list", limit=1000, before=before)
                target.asked += 1
                result = reply["result"]
                assert isinstance(result, dict)
                before = result["next"]

    return lambda: _on_each(read)


async def follows(target: Target) -> Stage:
    """The output of a job, 8 MiB, 50 times at once on each connection, again and again."""
    async with target.peer() as peer:
        job = await peer.run("head", "-c", str(8 * MIB), "/dev/zero")
        await peer.call("job.wait", id=job)

    async def follow() -> None:
        async with target.peer() as peer:
            for number in count():
                if number >= 50:
                    while b'"job.output_end"' not in (await peer.take())[1][:60]:
                        pass
                params = {"id": job, "delivery": {"encoding": "binary"}}
                await peer.send(request(number, "job.log", params))
                target.asked += 1

    return lambda: _on_each(follow)


async def ends(target: Target) -> Stage:
    """Large jobs end that 200 follow on each connection."""

    async def follow_and_stop() -> None:
        async with target.peer() as peer:
            while True:
                job = await peer.run("sleep", "600", environment=LARGE)
                for number in range(200):
                    await peer.send(request(-number, "job.log", {"id": job}))
                    target.asked += 1
                await peer.send(request(-1000, "job.stop", {"id": job}))
                left = 200
                while left:
                    if b'"job.output_end"' in (await peer.take())[1][:60]:
                        left -= 1

    return lambda: _on_each(follow_and_stop)


async def unread(target: Target) -> Stage:
    """Large replies and large output, asked for 128 times on each connection, and half read."""
    (job,) = await _large_jobs(target, 1)
    async with target.peer() as peer:
        output = await peer.run("head", "-c", str(8 * MIB), "/dev/zero")

    async def ask() -> None:
        while True:
            async with target.peer(buffer=4096) as peer:
                with suppress(trio.BrokenResourceError):
                    for number in range(64):
                        await peer.send(request(number, "job.status", {"id": job}))
                        params = {"id": output, "delivery": {"encoding": "binary"}}
                        await peer.send(request(64 + number, "job.log", params))
                        target.asked += 2
                    for _ in range(100):
                        await peer.stream.receive_some(1000)
                        await trio.sleep(0.02)

    return lambda: _on_each(ask, 16)


async def untaken(target: Target) -> Stage:
    """The end of an ended job, asked for 400 times on each connection, and hardly read."""
    async with target.peer() as peer:
        job = await peer.run("true", labels={f"k{n:02}": "v" * 250 for n in range(8)})
        await peer.call("job.wait", id=job)
    requests = b"".join(request(number, "job.wait", {"id": job}) for number in range(400))

    async def ask() -> None:
        while True:
            with suppress(trio.BrokenResourceError, EOFError):
                async with target.peer(buffer=4096) as peer:
                    await peer.send(requests)
                    target.asked += 400
                    for _ in range(100):
                        await peer.stream.receive_some(1000)
                        await trio.sleep(1)

    return lambda: _on_each(ask, 150)


async def pings(target: Target) -> Stage:
    """Pings without end, on a new connection whenever the service has ended one for that."""
    many = frame(PING, b"x" * 100) * 100

    async def ping() -> None:
        async with target.peer() as peer, trio.open_nursery() as nursery:

            async def read() -> None:
                with suppress(trio.BrokenResourceError):
                    while await peer.stream.receive_some():
                        pass

            nursery.start_soon(read)
            with suppress(trio.BrokenResourceError):  # it is ended: too_many_frames
                while True:
                    await peer.send(many)
                    target.asked += 100
            nursery.cancel_scope.cancel()

    async def keep_pinging() -> None:
        while True:
            with suppress(trio.BrokenResourceError, EOFError):
                await ping()

    return lambda: _on_each(keep_pinging)


async def fragments(target: Target) -> Stage:
    """Parts of messages that never end, from a client whose large messages are dropped."""
    target.be("viewer-client")
    part = unfinished(frame(CONTINUATION, b" " * 520))

    async def send() -> None:
        async with target.peer() as peer:
            while True:
                await peer.send(unfinished(frame(TEXT, b"[")))
                for _ in range(100):
                    await peer.send(part * 64)
                    target.asked += 64
                await peer.send(frame(CONTINUATION, b"]"))

    return lambda: _on_each(send, 150)


async def garbage(target: Target) -> Stage:
    """Bytes that are no TLS, frames that are no WebSocket, messages that are no request."""
    wrong = (
        b"\xff" * 40,
        frame(TEXT, b"{" * 30_000),
        frame(TEXT, b"[" * 30_000),
        frame(TEXT, b"\xff\xfe"),
        request(1, "job.pwn", {}) * 50,
        request(1, "job.stop", {"id": "7"}) * 50,
        frame(3, b"x"),
    )

    async def strange() -> None:
        while True:
            tcp = await target.dial()
            async with tcp:
                with suppress(trio.BrokenResourceError):
                    await tcp.send_all(os.urandom(2000))
                    await tcp.receive_some()
            target.asked += 1

    async def known() -> None:
        while True:
            for data in wrong:
                with suppress(trio.BrokenResourceError, EOFError):
                    async with target.peer() as peer:
                        await peer.send(data)
                        await peer.take()
                target.asked += 1

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(strange)
            nursery.start_soon(known)

    return lambda: _on_each(both)


async def connects(target: Target) -> Stage:
    """Connections with a valid certificate that are closed at once, and bare ones."""

    async def connect() -> None:
        while True:
            with suppress(trio.BrokenResourceError, EOFError):
                async with target.peer():
                    target.asked += 1
            async with await target.dial():
                target.asked += 1

    return lambda: _on_each(connect, 8)


async def hellos(target: Target) -> Stage:
    """Handshakes that are begun and never ended, as a job on the host's network may."""
    outgoing = ssl.MemoryBIO()
    tls = target.context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=target.host)
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    os.setuid(FIRST_UID)

    async def begin() -> None:
        while True:
            async with await target.dial() as tcp:
                with suppress(trio.BrokenResourceError), trio.move_on_after(STANDING_SECONDS):
                    await tcp.send_all(hello)
                    while await tcp.receive_some():
                        pass
            target.asked += 1

    return lambda: _on_each(begin, 300)


class Flood(NamedTuple):
    """One of them."""

    what: str
    begin: Callable[[Target], Awaitable[Stage]]


FLOODS = {
    "parameters": Flood("large parameters", large_parameters),
    "records": Flood("large records", large_records),
    "searches": Flood("label searches", searches),
    "tails": Flood("tails of a long index", tails),
    "lists": Flood("lists", lists),
    "follows": Flood("200 follows of 8 MiB", follows),
    "ends": Flood("ends with 200 followers", ends),
    "unread": Flood("half-read replies", unread),
    "untaken": Flood("short replies on 150 connections, untaken", untaken),
    "pings": Flood("pings", pings),
    "fragments": Flood("fragments on 150 connections", fragments),
    "garbage": Flood("garbage", garbage),
    "connects": Flood("connects", connects),
    "hellos": Flood("handshakes never ended", hellos),
}


async def main(name: str, address: str, certs: Path, seconds: float) -> None:
    """Flood."""
    os.nice(10)  # it is the service's fairness that is asked for, not the processor's
    if apart := os.environ.get(PROCESSORS):
        os.sched_setaffinity(0, map(int, apart.split()))
    target = Target(address, certs)
    flood = await FLOODS[name].begin(target)
    print("ready", flush=True)
    with trio.move_on_after(seconds):
        await flood()
    print(target.asked, flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
