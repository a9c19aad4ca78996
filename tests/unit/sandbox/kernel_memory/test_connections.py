"""Connections that nobody has accepted, found among a network's sockets."""

import contextlib
import os
import socket
import struct

import pytest

from jobworker.sandbox.kernel_memory import connections as kernel_connections
from jobworker.sandbox.kernel_memory import sockets as kernel_sockets
from jobworker.sandbox.kernel_memory.connections import CONNECTION_BYTES, UnacceptedConnections
from jobworker.sandbox.kernel_memory.listeners import SocketOwners
from jobworker.sandbox.kernel_memory.sockets import Socket

SENT = 50_000


def of_port(port: int) -> list[Socket]:
    wanted = port.to_bytes(2)
    return [one for one in kernel_sockets.sockets(socket.IPPROTO_TCP) if one.port == wanted]


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_what_waits_to_be_accepted_is_counted(family: int, address: str) -> None:
    with socket.socket(family) as server:
        server.bind((address, 0))
        server.listen(10)
        port = server.getsockname()[1]
        others = [socket.create_connection((address, port)) for _ in range(4)]
        others[0].sendall(bytes(SENT))
        others[1].sendall(bytes(SENT))
        others[1].close()
        others[2].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        others[2].close()
        found = of_port(port)
        (listening,) = (one for one in found if one.state == 10)
        assert (listening.queue, listening.uid) == (4, os.getuid())
        waiting = kernel_connections.unaccepted_in(found)
        assert waiting.unseen == 1, "the one that was reset"
        assert waiting.memory_bytes >= 2 * SENT + 4 * CONNECTION_BYTES
        with server.accept()[0] as accepted:
            assert accepted.fileno() >= 0
            assert kernel_connections.unaccepted_in(of_port(port)).memory_bytes < (
                waiting.memory_bytes - SENT
            )
        others[0].close()
        others[3].close()


def test_socket_that_is_closed_and_sends_on_is_an_orphan() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bind(("127.0.0.1", 0))
        server.listen()
        client = socket.create_connection(server.getsockname())
        with server.accept()[0]:
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.send(bytes(SENT))
            before = kernel_connections._read("/proc/self", 5.0)
            client.close()
            after = kernel_connections._read("/proc/self", 5.0)
    assert _most(before.buffers) >= SENT
    assert _most(after.orphans) >= max(SENT, _most(before.orphans))


def _most(sizes: list[tuple[int, int]]) -> int:
    return max((size for uid, size in sizes if uid == os.getuid()), default=0)


def test_on_the_hosts_network_a_connection_is_the_listening_jobs() -> None:
    def row(state: int, address: bytes, queue: int = 0, uid: int = 0, inode: int = 0) -> Socket:
        return Socket(socket.AF_INET, state, b"\x1f\x90", address, 0, queue, uid, inode, 100)

    here, there, anywhere = b"here".ljust(16, b"\0"), b"there".ljust(16, b"\0"), bytes(16)
    sockets = [
        row(10, here, queue=2, uid=1005, inode=1),
        row(10, anywhere, queue=1, uid=2005, inode=2),
        row(1, here),
        row(8, there),
        row(1, here, inode=3),
        row(4, here),
    ]
    ranges = {range(1000, 2000): 7, range(2000, 3000): 8, range(3000, 4000): 9}
    found = kernel_connections._by_job(sockets, SocketOwners(ranges))
    assert {job: kernel_connections.unaccepted_in(each) for job, each in found.items()} == {
        7: UnacceptedConnections(100 + 2 * CONNECTION_BYTES, 1),
        8: UnacceptedConnections(100 + CONNECTION_BYTES, 0),
    }
