"""What the launcher does for a job also where it has no descriptor left, or meets a fault."""

import os
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox import event_loop as turns_module
from jobworker.sandbox.cgroup.none import NoTree
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.launcher import held_starts
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.jobs import Jobs
from jobworker.sandbox.launcher.kernel_watch import KernelWatch
from jobworker.sandbox.launcher.reports import DIED
from jobworker.sandbox.launcher.scopes import Scopes
from jobworker.sandbox.launcher.sweepers import Sweepers
from jobworker.sandbox.launcher.walls import Walls
from jobworker.sandbox.protocol.fields import decode
from jobworker.sandbox.protocol.replies import REFUSAL, Refusal
from jobworker.sandbox.service.launcher_refusals import explain
from jobworker.sandbox.start.plan import Slot

from ....descriptors import descriptors


@pytest.fixture
def child(request: pytest.FixtureRequest) -> Iterator[Child]:
    """A child that ignores SIGUSR1, and has no handler for any signal.

    By the parameter it does something before.
    """
    script = f"{getattr(request, 'param', '')}\ntrap '' USR1; echo; read x"
    pipe = subprocess.PIPE
    with subprocess.Popen(["sh", "-c", script], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        made = Child(Slot("job", 1, 1), 0, NoTree("none", "").create("job"))
        made.pid, made.pidfd = process.pid, os.pidfd_open(process.pid)
        yield made
        os.close(made.pidfd)
        process.kill()


class Told(Jobs):
    """As much of the launcher's jobs as these tests need, and what it has told."""

    def __init__(self, event_loop: EventLoop, forks: ForkServer) -> None:
        scopes, sweepers = Scopes(event_loop, forks), Sweepers(event_loop, forks)
        pool = SimpleNamespace(sweepers=sweepers, scopes=scopes)
        self._event_loop, self._pool = event_loop, cast("ChildPool", pool)
        self._children, self._untold, self._spares = set(), set(), cast("object", [])  # type: ignore[assignment]
        self._jobs, self._late, self._unstarted = {}, cast("object", []), {}  # type: ignore[assignment]
        self._looks = 0
        self.told = list[channel.Message]()
        self._tell = lambda message, _: self.told.append(message)

    def pass_turns_until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._event_loop.run_once()


def test_lost_descriptors_of_a_child_are_told_and_none_is_left_open(
    child: Child, event_loop: EventLoop, forks: ForkServer
) -> None:
    jobs = Told(event_loop, forks)
    near, child.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    channel.send(near, {"disk": True}, [null, null])
    jobs._event_loop.watch(child.sock.fileno(), partial(jobs._on_word, child))
    before = len(descriptors())
    first_free = os.dup(null)
    os.close(first_free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + 1, limits[1]))
    try:
        jobs._event_loop.run_once()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert child.failure is not None
    assert "LimitNOFILE=" in explain(decode(Refusal, REFUSAL, child.failure)).remedy
    assert child.doomed
    sweepers = jobs._pool.sweepers
    jobs.pass_turns_until(lambda: sweepers.is_idle and forks.is_idle)
    assert len(descriptors()) == before - 1, "its socket has gone, nothing has come"
    near.close()
    os.close(null)


def test_word_that_a_place_is_free_is_said_again_where_that_failed(
    child: Child, monkeypatch: pytest.MonkeyPatch, event_loop: EventLoop, forks: ForkServer
) -> None:
    monkeypatch.setattr(turns_module, "AGAIN_SECONDS", 0)
    jobs, said = Told(event_loop, forks), list[str]()

    def fail_once() -> None:
        said.append("free")
        if len(said) == 1:
            raise KeyError("unforeseen")

    child.when_cleared = fail_once
    jobs._untold.add(child)
    jobs._event_loop.call_with_retries(partial(jobs._tell_cleared, child))
    jobs.pass_turns_until(lambda: not jobs._untold)
    assert len(said) == 2


def test_word_that_could_not_be_said_is_not_for_the_next_service(
    child: Child, monkeypatch: pytest.MonkeyPatch, event_loop: EventLoop, forks: ForkServer
) -> None:
    monkeypatch.setattr(turns_module, "AGAIN_SECONDS", 0)
    jobs, said = Told(event_loop, forks), list[str]()

    def fail() -> None:
        said.append("free")
        raise KeyError("unforeseen")

    child.request, child.when_cleared = 7, fail
    jobs._untold.add(child)
    jobs._event_loop.call_with_retries(partial(jobs._tell_cleared, child))
    jobs.undo_starts()
    done = list[bool]()
    jobs._event_loop.call_later(0.01, lambda: done.append(True))
    jobs.pass_turns_until(lambda: done)
    assert len(said) == 1
    assert not jobs.told


class Undoing(Told):
    """A start that could not be undone at the first try."""

    def __init__(
        self,
        child: Child,
        monkeypatch: pytest.MonkeyPatch,
        event_loop: EventLoop,
        forks: ForkServer,
    ) -> None:
        super().__init__(event_loop, forks)
        monkeypatch.setattr(turns_module, "AGAIN_SECONDS", 0)
        self.struck = False

        def hold(child: Child, hold: Callable[[Child], bool] = held_starts.hold) -> bool:
            if not self.struck:
                self.struck = True
                raise KeyError("unforeseen")
            return hold(child)

        monkeypatch.setattr(held_starts, "hold", hold)
        monkeypatch.setattr(self._pool, "close_pipes", lambda _: None, raising=False)
        self._kernel_watch = cast("KernelWatch", SimpleNamespace(wake=lambda: None))
        self._walls = cast("Walls", SimpleNamespace(build=lambda _: None))
        child.job, child.request = 1, 7
        self._jobs[1], self._children = child, {child}
        self.undo_starts()
        assert self.struck
        assert self.find(1) is child
        assert not self.started_after(0)


def test_start_whose_undoing_failed_is_undone_later(
    child: Child, monkeypatch: pytest.MonkeyPatch, event_loop: EventLoop, forks: ForkServer
) -> None:
    jobs = Undoing(child, monkeypatch, event_loop, forks)
    jobs.pass_turns_until(lambda: jobs.find(1) is None)
    assert child.doomed
    assert not jobs.told


def test_start_that_fails_before_it_could_be_undone_is_not_told_to_the_next_service(
    child: Child, monkeypatch: pytest.MonkeyPatch, event_loop: EventLoop, forks: ForkServer
) -> None:
    jobs = Undoing(child, monkeypatch, event_loop, forks)
    jobs._tell_failure(child, None)
    assert not jobs.told
    assert child.request is None


def test_program_that_runs_before_its_start_could_be_undone_goes_on_and_is_not_told_of(
    child: Child, monkeypatch: pytest.MonkeyPatch, event_loop: EventLoop, forks: ForkServer
) -> None:
    jobs = Undoing(child, monkeypatch, event_loop, forks)
    child.sock, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.close()
    child.ready = True
    jobs.pass_turns_until(lambda: child.request is None)
    assert jobs.started_after(0) == [child]
    assert not child.doomed
    assert not jobs.told


def test_child_that_ends_before_it_has_its_order_is_told_as_no_start(
    child: Child, event_loop: EventLoop, forks: ForkServer
) -> None:
    jobs = Told(event_loop, forks)
    child.sock, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.close()
    child.ready, child.order = True, os.memfd_create("order", os.MFD_CLOEXEC)
    child.job, child.request = 1, 7
    jobs._on_word(child)
    assert (child.request, child.failure) == (7, DIED)
    assert not jobs.told
    os.close(child.order)
