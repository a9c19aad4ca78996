"""When an ended process is reaped."""

import os
import resource
from types import SimpleNamespace

import pytest

from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.launcher import zombies as zombies_module
from jobworker.sandbox.launcher.zombies import COLLECT_SECONDS, Zombies

from ....descriptors import descriptors


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the module reads, in `now`."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(zombies_module, "time", clock)
    return clock


def ended() -> int:
    """The pidfd of a child of this process that has ended and is not reaped."""
    child = os.posix_spawn("/bin/true", ["true"], {})
    pidfd = os.pidfd_open(child)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    return pidfd


def is_reaped(pidfd: int) -> bool:
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def test_each_process_is_reaped_when_its_own_time_is_over(
    event_loop: EventLoop, clock: SimpleNamespace
) -> None:
    zombies, before = Zombies(event_loop), len(descriptors())
    one, two = ended(), ended()
    zombies.add(one)
    clock.now += COLLECT_SECONDS / 2
    zombies.add(two)
    zombies._collect()
    assert not is_reaped(one)
    clock.now += COLLECT_SECONDS / 2
    event_loop.cancel(zombies._collect)
    zombies._collect()
    assert is_reaped(one)
    assert not is_reaped(two)
    assert event_loop.is_scheduled(zombies._collect), "for the second one"
    event_loop.cancel(zombies._collect)
    clock.now += COLLECT_SECONDS / 2
    zombies._collect()
    assert is_reaped(two)
    assert not event_loop.is_scheduled(zombies._collect), "none is left"
    os.close(one)
    os.close(two)
    assert len(descriptors()) == before


def test_ended_processes_are_reaped_by_the_event_loop(
    event_loop: EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zombies_module, "COLLECT_SECONDS", 0.001)
    zombies, own = Zombies(event_loop), [ended(), ended()]
    for pidfd in own:
        zombies.add(pidfd)
    while not all(map(is_reaped, own)):
        assert event_loop.is_scheduled(zombies._collect)
        event_loop.run_once()
    for pidfd in own:
        os.close(pidfd)


def test_process_is_reaped_at_once_if_no_descriptor_is_left(event_loop: EventLoop) -> None:
    zombies, pidfd = Zombies(event_loop), ended()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        zombies.add(pidfd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert is_reaped(pidfd)
    assert not event_loop.is_scheduled(zombies._collect)
    os.close(pidfd)
