"""What is told of a launcher that cannot be reached, and what one tells of earlier jobs."""

import socket
import threading
import time
from pathlib import Path

import pytest

from jobworker.errors import HostUnsupported, LauncherGone, SandboxError
from jobworker.sandbox import channel
from jobworker.sandbox.protocol import events, operations
from jobworker.sandbox.protocol.replies import JobEntries
from jobworker.sandbox.protocol.version import PROTOCOL
from jobworker.sandbox.service import launch
from jobworker.sandbox.service.job_reports import exit_from, kept_job_from
from jobworker.sandbox.service.launcher_client import LauncherClient

from ....descriptors import descriptors


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
    entry = {"job": 1, "pid": 2, "age_seconds": 7.0, "exit": None, "asked": asked}
    page = operations.read_reply(operations.LIST, {"ok": {"jobs": [entry], "more": False}})
    assert isinstance(page, JobEntries)
    end = {"job": 1, "code": 0, "signal": None, "usage": {"pids": 0}, "ended_seconds_ago": 3.0}
    event = events.read({"event": "exit", **end})
    assert isinstance(event, events.JobEnded)
    listed = kept_job_from(page.jobs[0], -1, -1)
    ended = exit_from(event)
    now += 20
    launcher = LauncherClient(None)  # type: ignore[arg-type]
    launcher.inherit([listed])
    ((started, _),) = launcher.inherited.values()
    now += 10
    assert started.asked is not None
    assert (started.age_seconds, ended.seconds_ago) == (37, 33)
    assert (started.asked.seconds_ago, started.asked.kill_in_seconds) == (35, 20)


READY = {"ready": "v2", "gaps": [], "policy": {}, "bounds_disks": True, "protocol": PROTOCOL}
ENTRY = {"job": 1, "pid": 2, "age_seconds": 7.0, "exit": None}


@pytest.mark.parametrize(
    ("hello", "page", "words"),
    [
        ({**READY, "gaps": None}, {}, "gaps is no list"),
        ({**READY, "bounds_disks": 1}, {}, "bounds_disks is neither true nor false"),
        ({"error": {"code": 1, "message": "no"}}, {}, "remedy is no text"),
        ({"error": "no"}, {}, "error is no object"),
        (READY, {"id": 1, "ok": {}}, "the reply to list: jobs is no list"),
        (
            READY,
            {"id": 1, "ok": {"jobs": [{**ENTRY, "pid": None}], "more": False}},
            "pid is no integer",
        ),
        (
            READY,
            {"id": 1, "ok": {"jobs": [ENTRY], "more": False}},
            "1 jobs came with 1 descriptors",
        ),
        (READY, {"event": "exit", "job": 1}, "the event exit: code is no integer"),
    ],
)
def test_launcher_that_does_not_keep_to_the_protocol_is_refused_by_what_does_not_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hello: channel.Message,
    page: channel.Message,
    words: str,
) -> None:
    monkeypatch.setattr(launch, "_check_is_roots", lambda *_: None)
    path = str(tmp_path / "launcher.sock")
    before = descriptors()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()

        def play() -> None:
            with listener.accept()[0] as sock:
                channel.send(sock, hello)
                if channel.receive(sock) is None:
                    return
                channel.send(sock, {"id": 0, "ok": {}})
                channel.receive(sock)
                channel.send(sock, page, [sock.fileno()])

        thread = threading.Thread(target=play)
        thread.start()
        with pytest.raises(HostUnsupported, match="does not keep to the protocol") as caught:
            launch.connect_launcher(path)
        thread.join()
    assert words in caught.value.message
    assert descriptors() == before


def test_list_that_the_launcher_refuses_is_told_as_that() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fault = {"step": "launcher", "errno": 0, "detail": "an unexpected fault"}
    with near, far:
        channel.send(far, {"id": 1, "error": fault})
        near.settimeout(20)
        with pytest.raises(SandboxError, match="an unexpected fault"):
            launch._list(near, [])
