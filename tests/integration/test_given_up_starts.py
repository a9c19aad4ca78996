"""A start that is given up in the moment in which its program begins: what is told is true."""

import errno
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from jobworker.sandbox import channel, launch
from jobworker.sandbox.launch import start_launcher
from jobworker.sandbox.policy import Policy

from .conftest import child_of
from .test_launcher import Message, Service, make_policy  # noqa: F401 - a fixture

BEGINS_LATE = """
import sys; sys.path.insert(0, sys.argv[1])
import os, time
from jobworker.sandbox import children, launcher_jobs, trampoline
from jobworker.sandbox.children import Child
given_up = []
def send(child, errand):
    child._errand = errand
    os.pwrite(child.order, errand.image, 0)
def begin(child):
    child.sock.send(trampoline.GO)
    os.close(child.order)
    child.order = -1
    time.sleep(0.5)
def hear(child, hear=Child.hear):
    try:
        return hear(child)
    except BlockingIOError:
        if child in given_up and child.order >= 0:
            begin(child)
        raise
def give_up(jobs, child, why, give_up=launcher_jobs.Jobs._give_up):
    if "MOMENT" == "before":
        begin(child)
    given_up.append(child)
    return give_up(jobs, child, why)
if "MOMENT" == "never":
    children.become_job = lambda *_: time.sleep(600)
Child.send, Child.hear, launcher_jobs.Jobs._give_up = send, hear, give_up
from jobworker.sandbox.launcher import main; main(int(sys.argv[2]))
"""
"""A launcher that lets a job's program begin only at MOMENT: before its start is given up, or after
the look whether it has begun, before the kill. Or never: no child gets on with its preparation."""


@pytest.fixture
def serving(
    make_policy: Callable[..., Policy],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], Service]]:
    """Starts a launcher whose jobs' programs begin at a moment."""
    made: list[Service] = []

    def serve(moment: str) -> Service:
        monkeypatch.setattr(launch, "_BOOTSTRAP", BEGINS_LATE.replace("MOMENT", moment))
        policy = make_policy()
        made.append(Service(start_launcher(policy), policy))
        return made[-1]

    yield serve
    for service in made:
        service.sock.close()
        assert service.leaves() == 0


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Where the program tells that it runs."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        yield sock


def runs_told(listener: socket.socket) -> int:
    """How many programs have told that they run."""
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def trampolines(launcher: int, *, below_init: bool) -> list[int]:
    """Processes that wait for an order: children of the launcher, or of a job's init."""

    def children(pid: int) -> list[int]:
        with suppress(OSError):
            return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        return []

    def is_one(pid: int) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes() == b"trampoline\0"
        return False

    parents = children(launcher) if below_init else [launcher]
    return [pid for parent in parents for pid in children(parent) if is_one(pid)]


def give_up(
    service: Service, listener: socket.socket, *, init: bool = False, prepared: bool = True
) -> list[Message]:
    """Have a start given up for which nothing but the word to go on is missing: its replies.

    Unless it is not even to be `prepared`.
    """
    launcher, port = child_of(service.process.pid), listener.getsockname()[1]
    command = ("bash", "-c", f"echo > /dev/tcp/127.0.0.1/{port}; exit 5")
    spawn = {"id": 101, "op": "spawn", "job": 1, **service.fields(*command), "init": init}
    if init:
        channel.send(service.sock, spawn)
    deadline = time.monotonic() + 20
    while prepared and not trampolines(launcher, below_init=init):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if not init:
        channel.send(service.sock, spawn)
    channel.send(service.sock, {"id": 102, "op": "give_up", "job": 1})
    replies: dict[object, Message] = {}
    while len(replies) < 2:
        message, descriptors = service.receive()
        channel.close_all(descriptors)
        if message.get("id") is not None:
            replies[message["id"]] = message
    return [replies[101], replies[102]]


def test_program_that_was_told_as_not_executed_never_runs(
    serving: Callable[[str], Service], listener: socket.socket
) -> None:
    started, given_up = give_up(serving("after"), listener)
    assert given_up["ok"] == {"given_up": True}
    assert "its program was not executed" in str(started["error"])
    assert runs_told(listener) == 0


def test_program_that_has_begun_is_not_given_up_and_goes_on(
    serving: Callable[[str], Service], listener: socket.socket
) -> None:
    service = serving("before")
    started, given_up = give_up(service, listener)
    assert given_up["ok"] == {"given_up": False}
    assert "ok" in started
    assert service.exit_of(1)["code"] == 5
    assert runs_told(listener) == 1
    assert "ok" in service.ask("remove", 1)[0]


def test_program_below_an_init_that_may_have_begun_is_told_so(
    serving: Callable[[str], Service], listener: socket.socket
) -> None:
    """The init is stopped, which does not stop the process that executes the program."""
    started, given_up = give_up(serving("after"), listener, init=True)
    assert given_up["ok"] == {"given_up": True}
    error = started["error"]
    assert isinstance(error, dict)
    assert error["errno"] != errno.ECANCELED
    assert "may have begun" in error["detail"]
    assert runs_told(listener) == 1


def test_program_whose_init_was_not_executed_either_is_told_as_not_executed(
    serving: Callable[[str], Service], listener: socket.socket
) -> None:
    started, given_up = give_up(serving("never"), listener, init=True, prepared=False)
    assert given_up["ok"] == {"given_up": True}
    error = started["error"]
    assert isinstance(error, dict)
    assert error["errno"] == errno.ECANCELED
    assert runs_told(listener) == 0
