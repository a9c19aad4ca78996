"""Followers that cost little, so that what is measured is the server: an epoll loop over TLS.

    python bench/output_followers.py HOST:PORT CERTS COUNT LINE_BYTES

Connects COUNT times, prints a line, reads a job's id, follows it on every connection, and prints
one JSON object: bytes and checksum of each follower, and the delay in nanoseconds of the first
line in each piece that arrived, the oldest of them.
"""

import json
import re
import selectors
import socket
import ssl
import sys
import time
import zlib
from pathlib import Path

from attrs import define, field

OFFSET = re.compile(rb'"offset":(\d+)')


@define(eq=False)
class Follower:
    """One connection."""

    connection: ssl.SSLSocket
    line_bytes: int
    count: int = 0
    checksum: int = 0
    ended: bool = False
    delays_ns: list[int] = field(factory=list)
    _buffer: bytearray = field(factory=bytearray)

    def follow(self, job: int) -> None:
        """Subscribe, to binary pieces without credit."""
        delivery = {"encoding": "binary"}
        request = {"jsonrpc": "2.0", "id": 1, "method": "job.log"}
        self._send_text(json.dumps({**request, "params": {"id": job, "delivery": delivery}}))

    def _send_text(self, text: str) -> None:
        payload = text.encode()
        assert 126 <= len(payload) < 65_536 or len(payload) < 126
        size = bytes([0x80 | len(payload)])
        if len(payload) >= 126:
            size = b"\xfe" + len(payload).to_bytes(2, "big")
        self.connection.sendall(b"\x81" + size + bytes(4) + payload)  # a mask of zeros

    def read(self) -> None:
        """Take what is there."""
        try:
            while True:
                data = self.connection.recv(65_536)
                if not data:
                    raise AssertionError("the server closed the connection")
                self._buffer += data
        except ssl.SSLWantReadError:
            pass
        now_ns = time.monotonic_ns()
        while frame := self._next_frame():
            self._take(*frame, now_ns)

    def _next_frame(self) -> tuple[int, bytes] | None:
        held = self._buffer
        if len(held) < 2:
            return None
        size, start = held[1] & 0x7F, 2
        if size >= 126:
            start = 4 if size == 126 else 10
            if len(held) < start:
                return None
            size = int.from_bytes(held[2:start], "big")
        if len(held) < start + size:
            return None
        first, payload = held[0], bytes(memoryview(held)[start : start + size])
        del held[: start + size]
        return first, payload

    def _take(self, first: int, payload: bytes, now_ns: int) -> None:
        if first == 0x81:
            self.ended = self.ended or b'"job.output_end"' in payload
            return
        head, _, data = payload.partition(b"\n")
        found = OFFSET.search(head)
        assert found
        assert int(found[1]) == self.count, "a gap or a repeat"
        begin = -self.count % self.line_bytes
        if begin + 29 <= len(data):
            self.delays_ns.append(now_ns - int(data[begin + 9 : begin + 29]))
        self.count += len(data)
        self.checksum = zlib.crc32(data, self.checksum)


def connect(address: str, certs: Path, line_bytes: int) -> Follower:
    """Connect, and upgrade to a WebSocket."""
    context = ssl.create_default_context(cafile=certs / "ca-cert.pem")
    context.load_cert_chain(certs / "admin-client-cert.pem", certs / "admin-client-key.pem")
    host, port = address.rsplit(":", 1)
    plain = socket.create_connection((host, int(port)))
    connection = context.wrap_socket(plain, server_hostname=host)
    connection.sendall(
        b"GET / HTTP/1.1\r\nHost: " + address.encode() + b"\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Protocol: jobworker.v1\r\n\r\n"
    )
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 101"), answer
    connection.setblocking(False)
    return Follower(connection, line_bytes)


def main(address: str, certs: Path, count: int, line_bytes: int) -> None:
    """Follow."""
    followers = [connect(address, certs, line_bytes) for _ in range(count)]
    print("ready", flush=True)
    job = int(sys.stdin.readline())
    selector = selectors.DefaultSelector()
    for follower in followers:
        selector.register(follower.connection, selectors.EVENT_READ, follower)
        follower.follow(job)
    left = count
    while left:
        for key, _ in selector.select():
            key.data.read()
            if key.data.ended:
                selector.unregister(key.fileobj)
                left -= 1
    delays = sorted(delay for follower in followers for delay in follower.delays_ns)
    print(
        json.dumps(
            {
                "got": sorted({(follower.count, follower.checksum) for follower in followers}),
                "p50_ms": delays[len(delays) // 2] / 1e6,
                "p99_ms": delays[len(delays) * 99 // 100] / 1e6,
                "pieces": len(delays),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
