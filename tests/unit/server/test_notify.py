"""Telling a supervisor: one that cannot be reached is no fault of the service's."""

import os
import socket
from pathlib import Path

import pytest

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
