"""A chore is done, and its outcome told, and the launcher waits for none of its processes."""

import errno
import os
import resource
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from jobworker.sandbox import channel, disposal
from jobworker.sandbox import chores as chores_module
from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import CROWDED, UNENDING, Chores
from jobworker.sandbox.disposal import Disposal
from jobworker.sandbox.event_loop import Turns

from .held_locks import held_epoll


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_chore_that_cannot_be_watched_is_told_of_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns, outcomes = Turns(), list[Message]()
    made = Chores(turns, at_once=1, waiting=0)
    monkeypatch.setattr(turns, "watch", refuse)
    monkeypatch.setattr(chores_module, "LOOK_AGAIN_SECONDS", 0)
    before = os.listdir("/proc/self/fd")
    wait, go = os.pipe2(os.O_CLOEXEC)
    made.start(lambda: {"read": len(os.read(wait, 1))}, outcomes.append, [wait])
    for _ in range(3):
        turns.turn()
    assert not outcomes, "nothing has waited for it"
    with pytest.raises(OSError, match="too much waits") as refused:
        made.start(lambda: {}, outcomes.append)
    assert refused.value.errno == CROWDED, "it takes its place meanwhile"
    os.write(go, b"!")
    while not outcomes:
        turns.turn()
    assert outcomes == [{"read": 1}]
    os.close(wait)
    os.close(go)
    assert os.listdir("/proc/self/fd") == before
    made.start(lambda: {}, outcomes.append)
    while len(outcomes) < 2:
        turns.turn()


def test_process_that_a_tracer_has_is_not_waited_for(
    traced: tuple[int, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, outcomes, (pidfd, let_go) = Turns(), list[Message](), traced
    monkeypatch.setattr(chores_module, "LOOK_AGAIN_SECONDS", 0)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        channel.send(far, {"done": True})
        made = Chores(turns, at_once=1, waiting=0)
        turns.watch(pidfd, partial(made._on_exit, near, pidfd, outcomes.append))
        for _ in range(3):
            turns.turn()
        assert not outcomes
        let_go()
        while not outcomes:
            turns.turn()
        assert outcomes == [{"done": True}]


def test_disposal_that_a_tracer_has_is_not_waited_for(
    traced: tuple[int, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, (pidfd, let_go) = Turns(), traced
    monkeypatch.setattr(disposal, "AGAIN_SECONDS", 0)
    disposed = Disposal(turns)
    disposed._processes.add(pidfd)
    turns.watch(pidfd, partial(disposed._on_exit, pidfd))
    for _ in range(3):
        turns.turn()
    assert disposed._processes == {pidfd}
    let_go()
    while disposed._processes:
        turns.turn()


def test_long_outcome_that_finds_no_descriptor_is_told_as_that() -> None:
    turns, outcomes = Turns(), list[Message]()
    long: Message = {"text": "x" * (2 * channel.MAX_INLINE_BYTES)}
    Chores(turns, at_once=1, waiting=0).start(lambda: long, outcomes.append)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        while not outcomes:
            turns.turn()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert outcomes[0]["errno"] == errno.EMFILE


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores_module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(chores_module, "MOST_WAITING_SECONDS", 0.2)


def outcome_of(turns: Turns, outcomes: list[Message], count: int = 1) -> Message:
    """The latest one, once there are so many."""
    while len(outcomes) < count:
        turns.turn()
    return outcomes[-1]


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
def test_chore_that_waits_too_long_is_ended() -> None:
    turns, outcomes = Turns(), list[Message]()
    before = os.listdir("/proc/self/fd")
    Chores(turns, at_once=1, waiting=0, unending=1).start(wait_for_ever, outcomes.append)
    assert outcome_of(turns, outcomes)["errno"] == errno.EINTR
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.usefixtures("impatient")
@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the kernel does not tell")
def test_chore_that_uses_a_processor_has_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, outcomes = Turns(), list[Message]()
    chores = Chores(turns, at_once=1, waiting=0, unending=1)
    chores.start(work_a_while, outcomes.append)
    assert outcome_of(turns, outcomes) == {"done": True}
    monkeypatch.setattr(chores_module, "MOST_SECONDS", 0.2)
    chores.start(work_for_ever, outcomes.append)
    assert outcome_of(turns, outcomes, 2)["errno"] == errno.EINTR


@pytest.mark.usefixtures("impatient")
@pytest.mark.skipif(os.geteuid() != 0, reason="having the kernel wait for a page needs root")
def test_chore_that_cannot_be_ended_gives_its_place_to_others_up_to_a_bound() -> None:
    turns, outcomes = Turns(), list[Message]()
    chores = Chores(turns, at_once=1, waiting=9, unending=2)
    before = os.listdir("/proc/self/fd")

    def held() -> Message:
        return {"text": Path(fdinfo).read_text()}

    with held_epoll() as fdinfo:
        chores.start(held, outcomes.append)
        chores.start(lambda: {"done": True}, outcomes.append)
        outcome_of(turns, outcomes, 2)
        assert [each.get("errno") for each in outcomes] == [UNENDING, None], outcomes
        chores.start(held, outcomes.append)
        chores.start(lambda: {"done": True}, outcomes.append)
        assert outcome_of(turns, outcomes, 4)["errno"] == UNENDING, "the third was refused before"
        assert outcomes[2]["errno"] == CROWDED
        with pytest.raises(OSError, match="cannot be ended"):
            chores.start(lambda: {"done": True}, outcomes.append)
    while not set(os.listdir("/proc/self/fd")) <= set(before):  # an earlier test's may go, too
        turns.turn()
    chores.start(lambda: {"done": True}, outcomes.append)
    assert outcome_of(turns, outcomes, 5) == {"done": True}
