"""The launcher's loop, with a service at a real socket and jobs that are none."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.none import NoTree
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.launcher import listener as doorway
from jobworker.sandbox.launcher import loop as launcher_loop
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.loop import Launcher
from jobworker.sandbox.log import BoundedLog
from jobworker.sandbox.protocol.operations import ROWS
from jobworker.sandbox.protocol.replies import Refusal
from jobworker.sandbox.protocol.version import PROTOCOL
from jobworker.sandbox.service.launcher_refusals import explain
from jobworker.sandbox.start.plan import Slot


class NoJobs:
    """What the loop asks of jobs, where that can be answered without any."""

    def __init__(self, *_: object) -> None:
        self.asked = 0

    def promised_bytes(self) -> int:
        self.asked += 1
        raise KeyError("unforeseen")

    def started_after(self, _job: int) -> list[Child]:
        self.asked += 1
        return []


class NoStarts:
    """What the loop asks of starts when a service goes."""

    def __init__(self, *_: object) -> None:
        self.undone = 0

    def undo_all(self) -> None:
        self.undone += 1


def make_launcher(
    monkeypatch: pytest.MonkeyPatch, event_loop: EventLoop, forks: ForkServer
) -> Launcher:
    monkeypatch.setattr(launcher_loop, "Jobs", NoJobs)
    monkeypatch.setattr(launcher_loop, "Starts", NoStarts)
    monkeypatch.setattr(Launcher, "_leave_on_signals", lambda _: None)
    pool = SimpleNamespace(volumes=None, event_loop=event_loop, forks=forks)
    return Launcher(cast("ChildPool", pool), 0, {}, locks=-1)


class Service:
    """A launcher, by turns that the test takes, and its service."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.near, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        self.launcher.serve_one(self.near)
        self.hello = self.hear()
        self.ask("hello", protocol=PROTOCOL)

    def ask(self, op: str, **fields: object) -> channel.Message:
        channel.send(self.sock, {"id": 7, "op": op, **fields})
        self.launcher._event_loop.run_once()
        return self.hear()

    def hear(self) -> channel.Message:
        received = channel.receive(self.sock)
        assert received is not None
        return received[0]


@pytest.fixture
def service(
    monkeypatch: pytest.MonkeyPatch, event_loop: EventLoop, forks: ForkServer
) -> Iterator[Service]:
    service = Service(make_launcher(monkeypatch, event_loop, forks))
    with service.near, service.sock:
        yield service


def test_request_that_meets_an_unexpected_fault_is_refused_and_counted(
    service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    error = service.ask("promised")["error"]
    assert isinstance(error, dict)
    assert "launcher's log has it as incident" in error["detail"]
    assert f"{error['detail'].split()[-1]}: PromisedBytes" in capfd.readouterr().err
    assert service.ask("turns")["ok"]["incidents"] == 1  # type: ignore[index]


def test_every_operation_has_its_function(service: Service) -> None:
    assert service.launcher._functions.keys() == {row.name for row in ROWS}


def test_job_that_is_not_there_is_refused_as_that(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.launcher._jobs, "find", lambda _: None, raising=False)
    for op, fields in (("signal", {"signal": 15}), ("kill", {}), ("remove", {}), ("usage", {})):
        answered = service.ask(op, job=3, **fields)
        gone = {"step": "job", "errno": errno.ESRCH, "detail": "no such job"}
        assert answered == {"id": 7, "error": gone}


def test_service_that_has_not_told_its_version_is_refused(service: Service) -> None:
    service.launcher._greeted = False
    for op in ("ping", "list", "volume.list"):
        error = service.ask(op, after=0)["error"] if op == "list" else service.ask(op)["error"]
        assert isinstance(error, dict)
        assert (error["step"], error["errno"]) == ("hello", errno.EPROTO)


def test_ask_for_the_end_of_a_job_is_kept_where_its_signal_meets_a_fault(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise KeyError("unforeseen")

    child = Child(Slot("job", 1, 1), 0, NoTree("none", "").create("job"))
    monkeypatch.setattr(launcher_loop, "deliver", fail)
    monkeypatch.setattr(service.launcher._jobs, "find", lambda _: child, raising=False)
    error = service.ask("signal", job=1, signal=15, cause="stop", kill_in_ms=5000)["error"]
    assert isinstance(error, dict)
    assert str(explain(Refusal(**error))).startswith(
        "cannot serve the request: an unexpected fault"
    )
    assert child.asked is not None
    assert child.asked.cause == "stop"


def test_last_words_are_heard_one_in_a_turn_while_the_next_service_waits(
    monkeypatch: pytest.MonkeyPatch, event_loop: EventLoop, forks: ForkServer, tmp_path: Path
) -> None:
    monkeypatch.setattr(doorway, "AGAIN_SECONDS", 3600)
    launcher = make_launcher(monkeypatch, event_loop, forks)
    jobs = cast("NoJobs", launcher._jobs)
    listener, first, second = (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)
    )
    with listener, second:
        listener.bind(str(tmp_path / "launcher.sock"))
        listener.listen()
        launcher.serve_callers(listener, {os.getuid()})
        with first:
            first.connect(listener.getsockname())
            launcher._event_loop.run_once()
            channel.send(first, {"id": 1, "op": "hello", "protocol": PROTOCOL})
            for number in range(2, 50):
                channel.send(first, {"id": number, "op": "list", "after": 0})
        second.connect(listener.getsockname())
        second.setblocking(False)
        heard = None
        while heard is None:
            before = jobs.asked
            launcher._event_loop.run_once()
            assert jobs.asked <= before + 1
            try:
                heard = channel.receive(second)
            except BlockingIOError:
                assert launcher._link is None or launcher._link.is_at_its_end
        assert heard[0]["protocol"] == PROTOCOL, "it is let in at once, and not an hour later"
        assert jobs.asked == 48
        while launcher._disposal._chores.running:
            launcher._event_loop.run_once()
        assert launcher._link is not None
        launcher._link._sock.close()


def test_starts_are_undone_also_where_what_the_service_left_cannot_be_closed(
    monkeypatch: pytest.MonkeyPatch, event_loop: EventLoop, forks: ForkServer, tmp_path: Path
) -> None:
    launcher = make_launcher(monkeypatch, event_loop, forks)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as service,
    ):
        listener.bind(str(tmp_path / "launcher.sock"))
        listener.listen()
        launcher.serve_callers(listener, {os.getuid()})
        service.connect(listener.getsockname())
        launcher._event_loop.run_once()
        assert launcher._link is not None
        left = list[int]()

        def fail(descriptors: list[int]) -> None:
            left.extend(descriptors)
            raise KeyError("unforeseen")

        monkeypatch.setattr(launcher._disposal, "add", fail)
        service.close()
        launcher._event_loop.run_once()
        assert len(left) == 1
        assert cast("NoStarts", launcher._starts).undone == 1
        channel.close_all(left)


def test_visits_of_services_fill_no_log(
    event_loop: EventLoop,
    forks: ForkServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    launcher = make_launcher(monkeypatch, event_loop, forks)
    kind = socket.SOCK_SEQPACKET
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(str(tmp_path / "launcher.sock"))
        listener.listen()
        launcher.serve_callers(listener, {os.getuid()})
        for visit in range(BoundedLog.MOST_LINES):
            with socket.socket(socket.AF_UNIX, kind) as service:
                service.connect(listener.getsockname())
                for _ in range(3):
                    channel.send(service, {"id": 1, "op": "hello", "protocol": PROTOCOL})
                while launcher._link is None or not launcher._greeted:
                    event_loop.run_once()
            while launcher._link is not None:
                event_loop.run_once()
            if not visit:
                told = capfd.readouterr().err
                assert told.count("a service has come") == 1, "it has said hello three times"
                assert told.count("the service has gone") == 1
        while launcher._disposal._chores.running:  # they close the connections
            event_loop.run_once()
    assert capfd.readouterr().err.count("service has") == BoundedLog.MOST_LINES - 2
