"""Sockets that a kernel cannot list are told of, and keep no other from being listed."""

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from jobworker.sandbox import netlink
from jobworker.sandbox.kernel_memory import connections as kernel_connections
from jobworker.sandbox.kernel_memory import sockets as kernel_sockets


@pytest.fixture
def without_udp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without CONFIG_INET_UDP_DIAG."""
    dump = netlink.dump

    def answer(kind: int, body: bytes, **how: int) -> Iterator[bytes]:
        if body[1] == socket.IPPROTO_UDP:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return dump(kind, body, protocol=how["protocol"])

    monkeypatch.setattr(netlink, "dump", answer)


@pytest.mark.usefixtures("without_udp")
def test_sockets_that_cannot_be_listed_are_told_of_once(capfd: pytest.CaptureFixture[str]) -> None:
    kernel_sockets.tell_what_cannot_be_listed()
    (line,) = capfd.readouterr().err.splitlines()
    assert "cannot list sockets of UDP: " in line


def test_nothing_is_told_where_all_can_be_listed(capfd: pytest.CaptureFixture[str]) -> None:
    kernel_sockets.tell_what_cannot_be_listed()
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("without_udp")
def test_sockets_of_tcp_are_listed_where_those_of_udp_cannot_be() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1].to_bytes(2, "big")
        found = kernel_connections._read("/proc/self", 60)
    assert port in {one.port for one in found.tcp}
    assert found.is_all


def test_list_that_fails_is_not_taken_for_one_without_sockets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> Iterator[bytes]:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    monkeypatch.setattr(netlink, "dump", fail)
    with pytest.raises(OSError, match="No buffer space"):
        kernel_connections._read("/proc/self", 60)
