"""Scopes are killed and removed by the fork server, and again while a process is in one."""

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest

from jobworker.sandbox.cgroup import files
from jobworker.sandbox.cgroup.hierarchy import Tree
from jobworker.sandbox.channel import Message
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.fork_server import Answer
from jobworker.sandbox.forks import Done, ForkServer
from jobworker.sandbox.launcher import scopes as scopes_module
from jobworker.sandbox.launcher.scopes import AGAIN_SECONDS, SELDOM_SECONDS, Scopes


@pytest.fixture
def real(tree: Tree, event_loop: EventLoop) -> Iterator[Scopes]:
    """Scopes whose fork server kills and removes groups of the real tree."""

    def kill(name: str) -> Answer:
        tree.adopt(name).kill()
        return {}, []

    def remove(name: str) -> Answer:
        tree.adopt(name).remove()
        return {}, []

    forks = ForkServer(event_loop, {"kill": kill, "remove": remove}, tree.tops)
    yield Scopes(event_loop, forks)
    forks.close()


@pytest.fixture
def process(tree: Tree) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the scope "job"."""
    with subprocess.Popen(["sleep", "600"]) as made:
        for top in tree.tops:
            os.mkdir("job", dir_fd=top)
            files.write(top, "job/cgroup.procs", str(made.pid))
        yield made
        made.kill()


def test_kill_ends_what_is_in_the_scope(
    event_loop: EventLoop, real: Scopes, process: subprocess.Popen[bytes]
) -> None:
    real.kill("job")
    while process.poll() is None:
        event_loop.run_once()
    assert process.returncode == -signal.SIGKILL


def test_scope_is_removed_once_its_last_process_has_ended(
    event_loop: EventLoop, real: Scopes, tree: Tree, process: subprocess.Popen[bytes]
) -> None:
    gone = list[bool]()
    real.remove("job", lambda: gone.append(files.exists(tree.tops[0], "job")))
    while "job" not in real._busy:
        event_loop.run_once()
    assert not real.is_idle
    event_loop.run_once()
    assert not gone, "it is in use"
    process.kill()
    process.wait()
    while not gone:
        event_loop.run_once()
    assert gone == [False]
    assert real.is_idle
    assert not real._busy


class Played:
    """A fork server that the test plays: the calls, each with what gets its answer."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object, Done]] = []
        self.refuses = False

    def call(self, name: str, arguments: Sequence[object], done: Done) -> None:
        if self.refuses:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        self.calls.append((name, arguments[0], done))

    def answer(self, message: Message) -> None:
        """Answer the oldest call."""
        _, _, done = self.calls.pop(0)
        done(message, [])

    @property
    def asked(self) -> list[tuple[str, object]]:
        return [call[:2] for call in self.calls]


@pytest.fixture
def played() -> Played:
    return Played()


@pytest.fixture
def scopes(event_loop: EventLoop, played: Played) -> Scopes:
    return Scopes(event_loop, cast("ForkServer", played))


def test_kill_that_is_wanted_during_a_kill_follows_it_once(scopes: Scopes, played: Played) -> None:
    """Processes may have come in after the first one had read the list."""
    for _ in range(3):
        scopes.kill("job")
    assert played.asked == [("kill", "job")]
    played.answer({})
    assert played.asked == [("kill", "job")]
    played.answer({})
    assert played.asked == []


@pytest.mark.parametrize(
    ("code", "is_logged"), [(errno.ENOENT, False), (errno.EBUSY, True)], ids=["gone", "busy"]
)
def test_kill_that_fails_is_logged_unless_the_scope_is_gone(
    scopes: Scopes,
    played: Played,
    code: int,
    is_logged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = list[str]()
    monkeypatch.setattr(scopes_module, "log_line", lines.append)
    scopes.kill("job")
    played.answer({"errno": code, "detail": ""})
    assert bool(lines) == is_logged


def test_busy_scopes_are_tried_again_together_and_ever_more_seldom(
    scopes: Scopes, played: Played, event_loop: EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = list[float]()

    def call_later(seconds: float, call: Callable[[], None]) -> None:
        assert call == scopes._try_again
        pauses.append(seconds)

    monkeypatch.setattr(event_loop, "call_later", call_later)
    for name in ("one", "two"):
        scopes.remove(name, lambda: None)
    for _ in range(8):
        played.answer({"errno": errno.EBUSY, "detail": ""})
        monkeypatch.setattr(event_loop, "is_scheduled", lambda _: True)
        played.answer({"errno": errno.EBUSY, "detail": ""})
        monkeypatch.setattr(event_loop, "is_scheduled", lambda _: False)
        scopes._try_again()
        assert sorted(played.asked) == [("remove", "one"), ("remove", "two")]
    assert pauses[0] == AGAIN_SECONDS
    assert pauses == sorted(pauses)
    assert pauses[-1] == SELDOM_SECONDS


def test_scope_whose_removal_cannot_be_asked_for_is_removed_later(
    scopes: Scopes, played: Played, event_loop: EventLoop
) -> None:
    gone = list[bool]()
    played.refuses = True
    scopes.remove("job", lambda: gone.append(True))
    assert not scopes.is_idle
    played.refuses = False
    while not played.calls:
        event_loop.run_once()
    played.answer({})
    assert gone
    assert scopes.is_idle
