"""A chore is done, and its outcome told, without the launcher's waiting for its process."""

import errno
import os
import resource
import socket
from collections.abc import Callable
from functools import partial

import pytest

from jobworker.sandbox import channel, chores, disposal
from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import CROWDED, Chores
from jobworker.sandbox.disposal import Disposal
from jobworker.sandbox.turns import Turns


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_chore_that_cannot_be_watched_is_told_of_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns, outcomes = Turns(), list[Message]()
    made = Chores(turns, at_once=1, waiting=0)
    monkeypatch.setattr(turns, "watch", refuse)
    monkeypatch.setattr(chores, "LOOK_AGAIN_SECONDS", 0)
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
    monkeypatch.setattr(chores, "LOOK_AGAIN_SECONDS", 0)
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
