"""Who of this host is at the other end of a connection."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import trio

from jobworker.server.local_user import FIRST_SHARED, local_user

ACCOUNT, JOB, OTHER_JOB = 1234, FIRST_SHARED, 3_000_000_000


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
        assert local_user(tcp) == f"uid {ACCOUNT}"
    with connected(listening, host, JOB) as tcp, connected(listening, host, OTHER_JOB) as other:
        assert local_user(tcp) == local_user(other)
        assert "uid" not in str(local_user(tcp))


async def test_peer_that_has_gone_is_nobody_of_this_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()  # by a reset
        with trio.socket.from_stdlib_socket(ours) as tcp:
            assert local_user(tcp) is None
