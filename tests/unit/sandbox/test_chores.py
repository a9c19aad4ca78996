"""A chore that nothing can watch, or that does not end, leaves nothing and no place taken."""

import errno
import os
import time
from pathlib import Path

import pytest

from jobworker.sandbox import chores as chores_module
from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import CROWDED, UNENDING, Chores
from jobworker.sandbox.turns import Turns

from .held_locks import held_epoll


def test_chore_that_cannot_be_watched_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns, outcomes = Turns(), list[Message]()
    chores = Chores(turns, at_once=1, waiting=0)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(turns, "watch", refuse)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                chores.start(lambda: {}, outcomes.append)
    assert os.listdir("/proc/self/fd") == before
    chores.start(lambda: {"done": True}, outcomes.append)
    while not outcomes:
        turns.turn()
    assert outcomes == [{"done": True}]


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
    while os.listdir("/proc/self/fd") != before:
        turns.turn()
    chores.start(lambda: {"done": True}, outcomes.append)
    assert outcome_of(turns, outcomes, 5) == {"done": True}
