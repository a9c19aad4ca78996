"""A chore is done, and its outcome told, and the launcher waits for none of its processes."""

import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox import chores as chores_module
from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import CROWDED, UNENDING, Chores
from jobworker.sandbox.disposal import Disposal
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer

from ...descriptors import descriptors
from .held_locks import held_epoll


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_from(descriptor: int) -> Message:
    return {"read": len(os.read(descriptor, 1))}


def meet_a_fault() -> Message:
    raise ValueError("unforeseen")


def done() -> Message:
    return {"done": True}


def test_chore_that_cannot_be_watched_is_told_of_when_it_is_done(
    event_loop: EventLoop, forks: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = list[Message]()
    made = Chores(event_loop, forks, at_once=1, waiting=0)
    monkeypatch.setattr(event_loop, "watch", refuse)
    monkeypatch.setattr(chores_module, "LOOK_AGAIN_SECONDS", 0.001)
    before = descriptors()
    wait, go = os.pipe2(os.O_CLOEXEC)
    made.start(partial(read_from, wait), outcomes.append, [wait])
    while not forks.is_idle:
        event_loop.run_once()
    for _ in range(3):
        event_loop.run_once()
    assert not outcomes, "nothing has waited for it"
    with pytest.raises(OSError, match="too many chores wait") as refused:
        made.start(done, outcomes.append)
    assert refused.value.errno == CROWDED, "it takes its place meanwhile"
    os.write(go, b"!")
    while not outcomes:
        event_loop.run_once()
    assert outcomes == [{"read": 1}]
    os.close(wait)
    os.close(go)
    assert descriptors() == before
    made.start(done, outcomes.append)
    while len(outcomes) < 2:
        event_loop.run_once()


def test_unexpected_fault_of_a_chore_is_logged(
    capfd: pytest.CaptureFixture[str], event_loop: EventLoop
) -> None:
    outcomes = list[Message]()
    forks = ForkServer(event_loop, {})  # it has this test's standard error
    Chores(event_loop, forks, at_once=1, waiting=0).start(meet_a_fault, outcomes.append)
    while not outcomes:
        event_loop.run_once()
    forks.close()
    assert outcomes[0]["errno"] == errno.EPROTO
    assert "ValueError: unforeseen" in capfd.readouterr().err


def test_process_that_a_tracer_has_is_not_waited_for(
    event_loop: EventLoop,
    forks: ForkServer,
    traced: tuple[int, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes, (pidfd, let_go) = list[Message](), traced
    monkeypatch.setattr(chores_module, "LOOK_AGAIN_SECONDS", 0)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        channel.send(far, {"done": True})
        made = Chores(event_loop, forks, at_once=1, waiting=0)
        event_loop.watch(pidfd, partial(made._on_exit, near, pidfd, outcomes.append))
        for _ in range(3):
            event_loop.run_once()
        assert not outcomes
        let_go()
        while not outcomes:
            event_loop.run_once()
        assert outcomes == [{"done": True}]


def test_descriptors_that_are_given_are_closed_here_before_the_last_close(
    event_loop: EventLoop, forks: ForkServer
) -> None:
    read, write = os.pipe2(os.O_CLOEXEC)
    outcomes = list[Message]()
    Chores(event_loop, forks, at_once=1, waiting=0).start(
        partial(write_to, write), outcomes.append, given=[write]
    )
    outcome_of(event_loop, outcomes)
    assert os.read(read, 2) == b"!", "it had it at the same number"
    assert os.read(read, 1) == b"", "and nobody else has it"
    os.close(read)


def write_to(descriptor: int) -> Message:
    os.write(descriptor, b"!")
    return {}


def test_descriptors_on_their_way_out_are_closed_elsewhere(
    event_loop: EventLoop, forks: ForkServer
) -> None:
    disposed = Disposal(event_loop, forks)
    ends = []
    for _ in range(300):
        read, write = os.pipe2(os.O_CLOEXEC)
        ends.append(read)
        disposed.add([write])
    for read in ends:
        os.set_blocking(read, False)
        while True:
            try:
                assert os.read(read, 1) == b""
                break
            except BlockingIOError:
                event_loop.run_once()
        os.close(read)
    assert not disposed.overloaded


def long_outcome() -> Message:
    return {"text": "x" * (2 * channel.MAX_INLINE_BYTES)}


def test_long_outcome_that_finds_no_descriptor_is_told_as_that(
    event_loop: EventLoop, forks: ForkServer
) -> None:
    outcomes = list[Message]()
    chores = Chores(event_loop, forks, at_once=1, waiting=0)
    chores.start(long_outcome, outcomes.append)
    while forks.is_idle is False:
        event_loop.run_once()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        while not outcomes:
            event_loop.run_once()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert outcomes[0]["errno"] == errno.EMFILE


def test_chore_whose_fork_server_ends_is_done_by_the_next_one_and_once(
    event_loop: EventLoop, forks: ForkServer
) -> None:
    """The process may have been made: it has not begun, since nobody has let it."""
    read, write = os.pipe2(os.O_CLOEXEC)
    outcomes = list[Message]()
    chores = Chores(event_loop, forks, at_once=9, waiting=0)
    signal.pidfd_send_signal(forks._pidfd, signal.SIGSTOP)
    for _ in range(3):
        chores.start(partial(write_to, write), outcomes.append, [write])
    signal.pidfd_send_signal(forks._pidfd, signal.SIGKILL)
    outcome_of(event_loop, outcomes, 3)
    assert outcomes == [{}, {}, {}]
    assert os.read(read, 9) == b"!!!"
    os.close(read)
    os.close(write)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores_module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(chores_module, "MOST_WAITING_SECONDS", 0.2)


def outcome_of(event_loop: EventLoop, outcomes: list[Message], count: int = 1) -> Message:
    """The latest one, once there are so many."""
    while len(outcomes) < count:
        event_loop.run_once()
    return outcomes[-1]


def text_of(path: str) -> Message:
    return {"text": Path(path).read_text()}


def wait_for_ever() -> Message:
    time.sleep(1000)
    return {}


def work_for_ever() -> Message:
    while True:
        pass


def work_a_while() -> Message:
    while time.process_time() < 4 * chores_module.MOST_WAITING_SECONDS:
        pass
    return {"done": True}


@pytest.mark.usefixtures("impatient")
def test_chore_that_waits_too_long_is_ended(event_loop: EventLoop, forks: ForkServer) -> None:
    outcomes = list[Message]()
    before = descriptors()
    Chores(event_loop, forks, at_once=1, waiting=0, unending=1).start(
        wait_for_ever, outcomes.append
    )
    assert outcome_of(event_loop, outcomes)["errno"] == errno.EINTR
    assert descriptors() == before


@pytest.mark.usefixtures("impatient")
@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the kernel does not tell")
def test_chore_that_uses_a_processor_has_longer(
    event_loop: EventLoop, forks: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = list[Message]()
    chores = Chores(event_loop, forks, at_once=1, waiting=0, unending=1)
    chores.start(work_a_while, outcomes.append)
    assert outcome_of(event_loop, outcomes) == {"done": True}
    monkeypatch.setattr(chores_module, "MOST_SECONDS", 0.2)
    chores.start(work_for_ever, outcomes.append)
    assert outcome_of(event_loop, outcomes, 2)["errno"] == errno.EINTR


@pytest.mark.usefixtures("impatient")
@pytest.mark.skipif(os.geteuid() != 0, reason="having the kernel wait for a page needs root")
def test_chore_that_cannot_be_ended_gives_its_place_to_others_up_to_a_bound(
    event_loop: EventLoop, forks: ForkServer
) -> None:
    outcomes = list[Message]()
    chores = Chores(event_loop, forks, at_once=1, waiting=9, unending=2)
    before = descriptors()

    with held_epoll() as fdinfo:
        held = partial(text_of, fdinfo)
        chores.start(held, outcomes.append)
        chores.start(done, outcomes.append)
        outcome_of(event_loop, outcomes, 2)
        assert [each.get("errno") for each in outcomes] == [UNENDING, None], outcomes
        chores.start(held, outcomes.append)
        chores.start(done, outcomes.append)
        assert outcome_of(event_loop, outcomes, 4)["errno"] == UNENDING, (
            "the third was refused before"
        )
        assert outcomes[2]["errno"] == CROWDED
        with pytest.raises(OSError, match="cannot be ended"):
            chores.start(done, outcomes.append)
    while not set(os.listdir("/proc/self/fd")) <= set(before):  # an earlier test's may go, too
        event_loop.run_once()
    chores.start(done, outcomes.append)
    assert outcome_of(event_loop, outcomes, 5) == {"done": True}
