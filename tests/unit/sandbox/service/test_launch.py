"""What is told of a launcher that cannot be reached, and what one tells of earlier jobs."""

import socket
import time
from pathlib import Path

import pytest

from jobworker.errors import LauncherGone
from jobworker.sandbox.service import launch
from jobworker.sandbox.service.link import Link


def test_launcher_that_does_not_answer_is_not_to_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "START_SECONDS", 0.01)
    monkeypatch.setattr(launch, "_check_is_roots", lambda *_: None)
    path = str(tmp_path / "launcher.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(LauncherGone, match="no answer within") as caught:
            launch.connect_launcher(path)
    assert "see what holds it" in caught.value.remedy
    assert "worker launcher" not in caught.value.remedy


def test_launcher_whose_socket_is_gone_may_run(tmp_path: Path) -> None:
    with pytest.raises(LauncherGone, match="No such file") as caught:
        launch.connect_launcher(str(tmp_path / "launcher.sock"))
    assert "see whether it runs" in caught.value.remedy
    assert "its socket was removed" in caught.value.remedy


def test_moments_stay_where_they_are_however_late_somebody_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A history is opened between the launcher's word and the first who asks, and much output."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    asked = {"cause": "stop", "seconds_ago": 5, "kill_in_seconds": 50, "signals": [15]}
    entry: dict[str, object] = {"job": 1, "pid": 2, "age_seconds": 7.0, "exit": None}
    entry["asked"] = asked
    end = {"code": 0, "signal": None, "usage": {"pids": 0}, "ended_seconds_ago": 3.0}
    listed = launch._listed(entry, -1, -1)
    ended = launch.exit_from(end)
    now += 20
    link = Link(None)  # type: ignore[arg-type]
    link.inherit([listed])
    ((started, _),) = link.inherited.values()
    now += 10
    assert started.asked is not None
    assert (started.age_seconds, ended.seconds_ago) == (37, 33)
    assert (started.asked.seconds_ago, started.asked.kill_in_seconds) == (35, 20)
