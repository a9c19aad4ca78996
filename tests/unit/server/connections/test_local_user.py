"""Who of this host is at the other end of a connection."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
import trio

from jobworker.server.connections.local_user import IDS_TOGETHER, local_user

ACCOUNT, CONTAINER, JOBS = 1234, 5 * IDS_TOGETHER, range(8 * IDS_TOGETHER, 16 * IDS_TOGETHER)


@contextmanager
def connected(listening: str, host: str, uid: int) -> Iterator[trio.socket.SocketType]:
    """The service's end of a connection that a user has opened."""
    family = socket.AF_INET6 if ":" in listening else socket.AF_INET
    with ExitStack() as stack:
        listener = stack.enter_context(
            socket.create_server((listening, 0), family=family, dualstack_ipv6=listening == "::")
        )
        client = socket.AF_INET6 if ":" in host else socket.AF_INET
        before = os.geteuid()
        os.seteuid(uid)
        try:
            theirs = stack.enter_context(socket.socket(client))
        finally:
            os.seteuid(before)
        theirs.connect((host, listener.getsockname()[1]))
        ours = stack.enter_context(listener.accept()[0])
        yield trio.socket.from_stdlib_socket(ours)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sockets of other users")
@pytest.mark.parametrize(
    ("listening", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("::", "127.0.0.1"),
        ("::", "::1"),
        ("::", "::ffff:127.0.0.1"),
    ],
)
async def test_user_is_found_by_the_kernel_whatever_the_address(listening: str, host: str) -> None:
    with connected(listening, host, ACCOUNT) as tcp:
        assert local_user(tcp, JOBS) == f"uid {ACCOUNT}"
    with connected(listening, host, JOBS[0]) as tcp, connected(listening, host, JOBS[-1]) as other:
        assert local_user(tcp, JOBS) == local_user(other, JOBS) == "jobs"
    with connected(listening, host, CONTAINER) as tcp:
        of_one_container = local_user(tcp, JOBS)
    with connected(listening, host, CONTAINER + IDS_TOGETHER - 1) as tcp:
        assert local_user(tcp, JOBS) == of_one_container == "uids 327680 to 393215"
    with connected(listening, host, CONTAINER + IDS_TOGETHER) as tcp:
        assert local_user(tcp, JOBS) != of_one_container


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another network namespace")
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
async def test_who_listens_at_a_clients_port_is_not_taken_for_the_client(
    family: socket.AddressFamily,
) -> None:
    """The client is elsewhere: the kernel knows no such connection here, but tells of listeners."""
    with ExitStack() as stack:
        host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
        listener = stack.enter_context(socket.create_server((host, 0), family=family))
        theirs = stack.enter_context(socket.create_connection(listener.getsockname()[:2]))
        ours = stack.enter_context(listener.accept()[0])
        port = theirs.getsockname()[1]
        anywhere = "::" if family == socket.AF_INET6 else "0.0.0.0"
        theirs.close()
        bystander = stack.enter_context(socket.socket(family))
        bystander.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer = ours.getpeername(), ours.getsockname()
        ours.close()  # by a reset: nothing is left of the connection
        bystander.bind((anywhere, port))
        bystander.listen()
        assert local_user(_Told(family, *peer), JOBS) is None  # type: ignore[arg-type]


class _Told:
    """A connection's addresses, where there is no connection."""

    def __init__(self, family: int, theirs: tuple[str, int], ours: tuple[str, int]) -> None:
        self.family, self.getpeername, self.getsockname = family, lambda: theirs, lambda: ours


async def test_all_that_were_closed_with_something_unsent_have_one_name() -> None:
    """The end of such a connection cannot come before what nobody reads."""
    names = set()
    for host in ("127.0.0.1", "127.0.0.2"):
        with socket.create_server((host, 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
            theirs.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    theirs.send(bytes(100_000))
            theirs.close()
            with trio.socket.from_stdlib_socket(ours) as tcp:
                names.add(local_user(tcp, JOBS))
    assert names == {"closed"}


async def test_peer_that_has_gone_is_nobody_of_this_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()  # by a reset
        with trio.socket.from_stdlib_socket(ours) as tcp:
            assert local_user(tcp, JOBS) is None
