"""A supervisor that has no room for messages."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from jobworker.server.reporting.notify import Notifier


@pytest.fixture
def full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[tuple[Notifier, socket.socket, int]]:
    """A notifier, its supervisor whose queue other units have filled, and with how many messages.

    Of the AF_UNIX sockets that are connected to one, each may wait for room in its queue: unix(7).
    """
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
    ):
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notifier = Notifier()
        other.connect(str(tmp_path / "notify"))
        other.setblocking(False)
        sent = 0
        with suppress(BlockingIOError):
            while True:
                other.send(b"of another unit")
                sent += 1
        yield notifier, supervisor, sent
    notifier.notify_watchdog()  # which closes its socket: nobody listens any more
    assert notifier.descriptor is None


def drained(supervisor: socket.socket, count: int) -> None:
    for _ in range(count):
        assert supervisor.recv(100) == b"of another unit"
