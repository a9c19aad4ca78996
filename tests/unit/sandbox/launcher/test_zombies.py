"""When an ended process is reaped."""

import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from jobworker.sandbox import channel, fork_server, reaper
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
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


def until_reaper_has_gone() -> None:
    while reaper.is_running():
        time.sleep(0.001)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Reaping takes until this is set."""
    may, waitid = threading.Event(), os.waitid

    def slow_waitid(kind: int, number: int, options: int) -> object:
        if threading.get_native_id() == reaper._reaper.tid:
            may.wait()
        return waitid(kind, number, options)

    monkeypatch.setattr(os, "waitid", slow_waitid)
    yield may
    may.set()
    until_reaper_has_gone()


def test_what_ends_while_the_reaper_is_busy_waits_for_it(
    event_loop: EventLoop, clock: SimpleNamespace, slow: threading.Event
) -> None:
    """The event loop does not."""
    zombies, one, two = Zombies(event_loop), ended(), ended()
    for pidfd in (one, two):
        zombies.add(pidfd)
        clock.now += COLLECT_SECONDS
        event_loop.cancel(zombies._collect)
        zombies._collect()
    assert reaper.is_running()
    assert event_loop.is_scheduled(zombies._collect), "for the second one"
    slow.set()
    until_reaper_has_gone()
    assert (is_reaped(one), is_reaped(two)) == (True, False)
    event_loop.cancel(zombies._collect)
    zombies._collect()
    until_reaper_has_gone()
    assert is_reaped(two)
    assert not event_loop.is_scheduled(zombies._collect)
    os.close(one)
    os.close(two)


def test_no_process_is_copied_while_the_reaper_is_busy(slow: threading.Event) -> None:
    """The copy would have what a thread had locked, and no thread to unlock it."""
    pidfd = ended()
    assert reaper.start([os.dup(pidfd)])
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far, pytest.raises(BlockingIOError):
        fork_server.start("fork-server", {}, (), far)
    slow.set()
    until_reaper_has_gone()
    with near, far:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _, server = fork_server.start("fork-server", {}, (), far)
        far.close()
        near.close()
    os.waitid(os.P_PIDFD, server, os.WEXITED)
    os.close(server)
    os.close(pidfd)


def test_fork_server_is_made_anew_once_the_reaper_is_done(
    event_loop: EventLoop, slow: threading.Event
) -> None:
    forks, pidfd = ForkServer(event_loop, {"ask": _ask}), ended()
    try:
        assert reaper.start([os.dup(pidfd)])
        forks._kill()
        answers: list[channel.Message] = []
        forks.call("ask", (), lambda answer, _: answers.append(answer))
        while not event_loop.is_scheduled(forks._start_again):
            event_loop.run_once()
        slow.set()
        while not answers:
            event_loop.run_once()
        assert answers == [{"asked": True}]
    finally:
        forks.close()
    os.close(pidfd)


def _ask() -> fork_server.Answer:
    return {"asked": True}, []


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
    until_reaper_has_gone()
    assert is_reaped(one)
    assert not is_reaped(two)
    assert event_loop.is_scheduled(zombies._collect), "for the second one"
    event_loop.cancel(zombies._collect)
    clock.now += COLLECT_SECONDS / 2
    zombies._collect()
    until_reaper_has_gone()
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
    while zombies._ended:
        assert event_loop.is_scheduled(zombies._collect)
        event_loop.run_once()
    until_reaper_has_gone()
    assert all(map(is_reaped, own))
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
