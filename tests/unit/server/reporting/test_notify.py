"""Telling a supervisor: one that cannot be reached is no fault of the service's."""

import os
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from jobworker.sandbox.launcher import main as launcher
from jobworker.sd_notify import PATIENCE_SECONDS
from jobworker.server.reporting.notify import Notifier

from ..conftest import drained


async def test_supervisor_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notifier = Notifier()
        await notifier.notify(READY="1", STATUS="up")
        assert supervisor.recv(100) == b"READY=1\nSTATUS=up"
    await notifier.notify(STOPPING="1")
    assert notifier.descriptor is None, "a supervisor that has gone is not told any more"
    assert notifier.fault == ""
    assert "NOTIFY_SOCKET" not in os.environ, "jobs and programs of ours are not to have it"


def test_watchdog_that_finds_no_room_is_told_of_the_next_time(
    full: tuple[Notifier, socket.socket, int],
) -> None:
    notifier, supervisor, count = full
    notifier.notify_watchdog()
    drained(supervisor, count)
    notifier.notify_watchdog()
    assert supervisor.recv(100) == b"WATCHDOG=1"


async def test_what_is_told_once_waits_for_room_in_order_while_others_go_on(
    full: tuple[Notifier, socket.socket, int], autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    notifier, supervisor, count = full
    async with trio.open_nursery() as nursery:
        for field in ("READY", "STOPPING"):
            nursery.start_soon(partial(notifier.notify, **{field: "1"}))
            await trio.testing.wait_all_tasks_blocked()
        drained(supervisor, count)
    assert supervisor.recv(100) == b"READY=1"
    assert supervisor.recv(100) == b"STOPPING=1"


async def test_supervisor_that_reads_nothing_is_waited_for_a_bounded_time(
    full: tuple[Notifier, socket.socket, int], autojump_clock: trio.testing.MockClock
) -> None:
    notifier, supervisor, count = full
    began = autojump_clock.current_time()
    await notifier.notify(READY="1")
    took = autojump_clock.current_time() - began
    assert took == pytest.approx(PATIENCE_SECONDS, abs=0.1)
    drained(supervisor, count)
    await notifier.notify(STATUS="up")
    assert supervisor.recv(100) == b"STATUS=up"


@pytest.mark.parametrize("has_room", [True, False])
def test_launcher_waits_for_room_a_bounded_time(
    full: tuple[Notifier, socket.socket, int], monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    notifier, supervisor, count = full
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        if has_room and not now:
            drained(supervisor, count)
        now += seconds

    clock = SimpleNamespace(sleep=wait, monotonic=lambda: now)
    monkeypatch.setattr("jobworker.sd_notify.time", clock)
    launcher._notify(notifier.descriptor, "READY=1")
    if has_room:
        assert supervisor.recv(100) == b"READY=1"
    else:
        assert now == pytest.approx(PATIENCE_SECONDS, abs=0.1)


@pytest.mark.parametrize("path", ["/nonexistent/x", "{}/stale", "@none-abstract", 300 * "x", "."])
async def test_supervisor_that_cannot_be_reached_is_told_of_and_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stale:
        stale.bind(str(tmp_path / "stale"))
    monkeypatch.setenv("NOTIFY_SOCKET", path.format(tmp_path))
    notifier = Notifier()
    assert notifier.descriptor is None
    assert "NOTIFY_SOCKET" in notifier.fault
    await notifier.notify(READY="1")
