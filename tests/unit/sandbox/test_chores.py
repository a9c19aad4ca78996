"""A chore that nothing can watch leaves no process, no descriptor and no place taken."""

import errno
import os

import pytest

from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.turns import Turns


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
