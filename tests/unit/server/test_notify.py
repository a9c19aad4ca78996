"""Telling a supervisor: one that cannot be reached is no fault of the service's."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobworker.sandbox import launcher
from jobworker.sd_notify import PATIENCE_SECONDS
from jobworker.server.notify import Notifier


def test_supervisor_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notifier = Notifier()
        notifier.tell(READY="1", STATUS="up")
        assert supervisor.recv(100) == b"READY=1\nSTATUS=up"
    notifier.tell(STOPPING="1")
    assert notifier.descriptor is None, "a supervisor that has gone is not told any more"
    assert notifier.fault == ""
    assert "NOTIFY_SOCKET" not in os.environ, "jobs and programs of ours are not to have it"


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
    notifier.tell_alive()  # which closes its socket: nobody listens any more
    assert notifier.descriptor is None


def drained(supervisor: socket.socket, count: int) -> None:
    for _ in range(count):
        assert supervisor.recv(100) == b"of another unit"


def test_watchdog_that_finds_no_room_is_told_of_the_next_time(
    full: tuple[Notifier, socket.socket, int],
) -> None:
    notifier, supervisor, count = full
    notifier.tell_alive()
    drained(supervisor, count)
    notifier.tell_alive()
    assert supervisor.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("who", ["service", "launcher"])
def test_what_is_told_once_waits_for_room(
    full: tuple[Notifier, socket.socket, int], monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    notifier, supervisor, count = full
    waits = list[float]()

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            drained(supervisor, count)

    clock = SimpleNamespace(sleep=wait, monotonic=lambda: 0.0)
    monkeypatch.setattr("jobworker.sd_notify.time", clock)
    if who == "service":
        notifier.tell(READY="1")
    else:
        launcher._notify(notifier.descriptor, "READY=1")
    assert supervisor.recv(100) == b"READY=1"
    assert len(waits) == 2


def test_supervisor_that_reads_nothing_is_waited_for_a_bounded_time(
    full: tuple[Notifier, socket.socket, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    notifier, supervisor, count = full
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = SimpleNamespace(sleep=wait, monotonic=lambda: now)
    monkeypatch.setattr("jobworker.sd_notify.time", clock)
    notifier.tell(READY="1")
    assert now == pytest.approx(PATIENCE_SECONDS, abs=0.1)
    drained(supervisor, count)
    notifier.tell(STATUS="up")
    assert supervisor.recv(100) == b"STATUS=up"


@pytest.mark.parametrize("path", ["/nonexistent/x", "{}/stale", "@none-abstract", 300 * "x", "."])
def test_supervisor_that_cannot_be_reached_is_told_of_and_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stale:
        stale.bind(str(tmp_path / "stale"))
    monkeypatch.setenv("NOTIFY_SOCKET", path.format(tmp_path))
    notifier = Notifier()
    assert notifier.descriptor is None
    assert "NOTIFY_SOCKET" in notifier.fault
    notifier.tell(READY="1")
