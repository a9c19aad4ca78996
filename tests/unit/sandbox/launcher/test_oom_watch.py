"""Which jobs are ended when the kernel signals that a control group has no memory left."""

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox.cgroup.hierarchy import JobScope, ScopeLimits, Tree
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.launcher import oom_watch as oom_watch_module
from jobworker.sandbox.launcher.child import Child, ChildExit
from jobworker.sandbox.launcher.oom_watch import LOOK_SECONDS, OomWatch

from .conftest import StartChild

LIMIT_BYTES = 16 << 20
HOG = "x=$(head -c 64M /dev/zero | tr '\\0' x)"


@pytest.fixture
def scope(tree: Tree) -> Iterator[JobScope]:
    """A real scope with a memory limit, of which the kernel signals an event."""
    if tree.kind == "v2":
        pytest.skip("cgroup v2 signals no event: it ends a whole group by itself")
    made = tree.create("job")
    made.arm(ScopeLimits(memory_bytes=LIMIT_BYTES))
    yield made
    made.close()


@pytest.mark.parametrize("tree", [("memory", "pids")], indirect=True, ids=["memory"])
def test_job_of_which_the_kernel_kills_a_process_for_its_limit_is_ended(
    event_loop: EventLoop,
    start_child: StartChild,
    scope: JobScope,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(oom_watch_module, "LOOK_SECONDS", 600)  # however busy this machine is
    child, killed = start_child(), list[Child]()
    child.scope = scope
    watch = OomWatch(event_loop, killed.append)
    watch.watch(child)
    enter = partial(scope.attach_self, cloned=False)
    with subprocess.Popen(["sh", "-c", HOG], stderr=subprocess.DEVNULL, preexec_fn=enter):  # noqa: PLW1509 - one thread only
        while not killed:
            event_loop.run_once()
    assert killed == [child]
    assert child.want() == "limit"
    watch.forget(child)
    assert scope.oom_fd is not None
    assert not event_loop.watches(scope.oom_fd)


class Played:
    """A scope whose events and counts the test plays."""

    def __init__(self) -> None:
        self.oom_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.kills, self.is_over = 0, True

    def clear_oom(self) -> None:
        os.eventfd_read(self.oom_fd)

    def oom_kills(self) -> int:
        return self.kills

    def is_over_limit(self) -> bool:
        return self.is_over


class Watched:
    """A watch over one child, whose events the test plays, and whom the watch has ended."""

    def __init__(self, event_loop: EventLoop, child: Child, clock: SimpleNamespace) -> None:
        self.event_loop, self.child, self.clock = event_loop, child, clock
        self.scope, self.killed = Played(), list[Child]()
        child.scope = cast("JobScope", self.scope)
        self.watch = OomWatch(event_loop, self.killed.append)
        self.watch.watch(child)

    def signal(self) -> None:
        """Have the kernel signal an event, and take the turns in which the watch looks once."""
        os.eventfd_write(self.scope.oom_fd, 1)
        while not self.event_loop.is_scheduled(self.watch._look):
            self.event_loop.run_once()
        self.look()

    def look(self) -> None:
        self.event_loop.cancel(self.watch._look)
        self.watch._look()

    @property
    def looks_again(self) -> bool:
        return self.event_loop.is_scheduled(self.watch._look)


@pytest.fixture
def watched(
    event_loop: EventLoop, start_child: StartChild, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Watched]:
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(oom_watch_module, "time", clock)
    made = Watched(event_loop, start_child(), clock)
    yield made
    os.close(made.scope.oom_fd)


def test_kill_that_is_counted_after_its_event_ends_the_job(watched: Watched) -> None:
    watched.signal()
    assert not watched.killed
    assert watched.looks_again
    with pytest.raises(BlockingIOError):
        watched.scope.clear_oom()  # the watch has read the event
    watched.scope.kills = 1
    watched.look()
    assert watched.killed == [watched.child]
    assert not watched.looks_again


def test_kill_for_want_of_memory_on_the_host_ends_no_job(watched: Watched) -> None:
    watched.scope.kills, watched.scope.is_over = 1, False
    watched.signal()
    assert not watched.killed


def test_event_without_a_kill_is_forgotten_after_a_while(watched: Watched) -> None:
    watched.signal()
    watched.clock.now += LOOK_SECONDS
    watched.look()
    assert watched.looks_again
    watched.clock.now += 0.001
    watched.look()
    assert not watched.looks_again
    watched.scope.kills = 1
    watched.look()
    assert not watched.killed


def test_next_event_begins_the_while_anew(watched: Watched) -> None:
    watched.signal()
    watched.clock.now += LOOK_SECONDS
    watched.signal()
    watched.clock.now += LOOK_SECONDS
    watched.scope.kills = 1
    watched.look()
    assert watched.killed == [watched.child]


def test_job_that_has_ended_meanwhile_is_not_ended_again(watched: Watched) -> None:
    watched.signal()
    watched.scope.kills, watched.child.exit = 1, ChildExit(0, None)
    watched.look()
    assert not watched.killed
    assert not watched.looks_again


def test_child_that_is_forgotten_is_not_looked_at(watched: Watched) -> None:
    watched.signal()
    watched.watch.forget(watched.child)
    assert not watched.event_loop.watches(watched.scope.oom_fd)
    watched.scope.kills = 1
    watched.look()
    assert not watched.killed


def test_scope_without_events_is_not_watched(
    event_loop: EventLoop, start_child: StartChild
) -> None:
    child = start_child()
    assert child.scope.oom_fd is None
    watch = OomWatch(event_loop, lambda _: None)
    watch.watch(child)
    watch.forget(child)
