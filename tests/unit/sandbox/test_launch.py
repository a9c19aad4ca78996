"""What is told of a launcher that cannot be reached."""

import socket
from pathlib import Path

import pytest

from jobworker.errors import LauncherGone
from jobworker.sandbox import launch


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
