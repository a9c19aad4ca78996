"""At whose listening socket a connection waits, where several have its port."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from jobworker.sandbox.kernel_memory import sockets as kernel_sockets
from jobworker.sandbox.kernel_memory.listeners import Listeners, SocketOwners
from jobworker.sandbox.kernel_memory.sockets import ESTABLISHED, LISTEN, Socket

V4, V6 = socket.AF_INET, socket.AF_INET6
OWNERS = SocketOwners({range(1000, 1010): 1, range(1010, 1020): 2, range(2000, 2010): 3})
Listen = Callable[..., socket.socket]
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="a socket gets another user")


def test_a_job_owns_the_ids_of_its_range_alone() -> None:
    ids = [999, 1000, 1009, 1010, 1019, 1020, 2000, 2009, 2010]
    assert [OWNERS.of(uid) for uid in ids] == [0, 1, 1, 2, 2, 0, 3, 3, 0]


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Makes a listening socket of a user."""
    with contextlib.ExitStack() as opened:

        def make(
            family: int, address: str, uid: int, port: int = 0, *, only: int = 0, shared: int = 0
        ) -> socket.socket:
            one = opened.enter_context(socket.socket(family))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
            if family == V6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            os.fchown(one.fileno(), uid, -1)
            one.bind((address, port))
            one.listen(8)
            return one

        yield make


def port_of(one: socket.socket) -> int:
    return int(one.getsockname()[1])


def owner_at(address: str, port: int, then: Callable[[], None] = lambda: None) -> int | None:
    """Whose a connection is that waits there, of all that listen at the port."""
    with socket.create_connection((address, port), timeout=5):
        then()
        found = list(kernel_sockets.sockets(socket.IPPROTO_TCP))
    of_port = [one for one in found if one.port == port.to_bytes(2)]
    (waiting,) = (one for one in of_port if one.state == ESTABLISHED and not one.inode)
    return Listeners((one for one in of_port if one.state == LISTEN), OWNERS).owner_of(waiting)


@needs_root
def test_wildcards_of_both_families(listen: Listen) -> None:
    port = port_of(listen(V4, "0.0.0.0", 1000))
    listen(V6, "::", 1010, port, only=1)
    assert (owner_at("127.0.0.1", port), owner_at("::1", port)) == (1, 2)


@needs_root
def test_socket_for_both_families(listen: Listen) -> None:
    port = port_of(listen(V6, "::", 1010))
    assert (owner_at("127.0.0.1", port), owner_at("::1", port)) == (2, 2)


@needs_root
def test_addresses_of_both_families(listen: Listen) -> None:
    port = port_of(listen(V6, "::ffff:127.0.0.1", 1010))
    listen(V6, "::1", 1000, port)
    listen(V4, "127.0.0.2", 2000, port)
    owners = [owner_at(address, port) for address in ("127.0.0.1", "::1", "127.0.0.2")]
    assert owners == [2, 1, 3]


@needs_root
def test_several_sockets_of_one_job(listen: Listen) -> None:
    port = port_of(listen(V6, "::", 1010, shared=1))
    listen(V6, "::", 1010, port, shared=1)
    listen(V6, "::1", 1010, port, shared=1)
    assert (owner_at("127.0.0.1", port), owner_at("::1", port)) == (2, 2)


@needs_root
def test_socket_that_is_bound_to_a_device_later(listen: Listen) -> None:
    one = listen(V4, "0.0.0.0", 1010)

    def bind() -> None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")

    assert owner_at("127.0.0.1", port_of(one), then=bind) == 2
    assert owner_at("127.0.0.2", port_of(one)) == 2


@pytest.mark.parametrize(("device", "owner"), [(4, 1), (5, 2), (0, None), (6, None)])
def test_sockets_of_several_devices(device: int, owner: int | None) -> None:
    """A connection is nobody's where two jobs may have it, and none of the sockets its device."""

    def row(state: int, address: bytes, device: int, uid: int = 0) -> Socket:
        return Socket(V4, state, b"\x1f\x90", address.ljust(16, b"\0"), device, 0, uid, 0, 0)

    listening = [row(LISTEN, b"", 4, 1000), row(LISTEN, b"\x7f\0\0\1", 5, 1010)]
    connection = row(ESTABLISHED, b"\x7f\0\0\1", device)
    assert Listeners(listening, OWNERS).owner_of(connection) == owner
    assert Listeners(listening[:1], OWNERS).owner_of(connection) == 1
    assert Listeners([], OWNERS).owner_of(connection) is None
