"""The launcher's loop, with a service at a real socket and jobs that are none."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox import channel, launcher_loop
from jobworker.sandbox.children import Nursery
from jobworker.sandbox.launcher_loop import Launcher
from jobworker.sandbox.version import PROTOCOL


class NoJobs:
    """What the loop asks of jobs, where that can be answered without any."""

    def __init__(self, *_: object) -> None: ...

    def promised_bytes(self) -> int:
        raise KeyError("unforeseen")


class Service:
    """A launcher, by turns that the test takes, and its service."""

    def __init__(self) -> None:
        nursery = cast("Nursery", SimpleNamespace(volumes=None))
        self.launcher = Launcher(nursery, 0, {}, locks=-1)
        self.near, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        self.launcher.serve_one(self.near)
        self.hello = self.hear()
        self.ask("hello", protocol=PROTOCOL)

    def ask(self, op: str, **fields: object) -> channel.Message:
        channel.send(self.sock, {"id": 7, "op": op, **fields})
        self.launcher._turns.turn()
        return self.hear()

    def hear(self) -> channel.Message:
        received = channel.receive(self.sock)
        assert received is not None
        return received[0]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(launcher_loop, "Jobs", NoJobs)
    service = Service()
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
