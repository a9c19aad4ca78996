"""The launcher's side of the fork server: who calls gets the answer later, whatever it is."""

import errno
import os
import resource
from collections.abc import Iterator, Sequence

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.channel import MAX_INLINE_BYTES, Message
from jobworker.sandbox.disposal import Disposal
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.launcher import sweepers as sweepers_module
from jobworker.sandbox.launcher.sweepers import Sweepers

from ...descriptors import descriptors

FAILURES = 3


@pytest.fixture
def no_descriptor_left(forks: ForkServer) -> Iterator[None]:
    """This process can open no more, and so it can send no long call."""
    del forks  # it is there already
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("no_descriptor_left")
def test_call_that_cannot_be_sent_is_told_of_in_a_later_turn(
    event_loop: EventLoop, forks: ForkServer
) -> None:
    answers = list[Message]()
    forks.call("nothing", ("x" * MAX_INLINE_BYTES,), lambda message, _: answers.append(message))
    assert not answers, "who calls has not noted yet what the call is for"
    while not answers:
        event_loop.run_once()
    assert [answer["errno"] for answer in answers] == [errno.EMFILE]


@pytest.fixture
def failures(forks: ForkServer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel has no memory for the first messages; the list gets the errno of each."""
    del forks  # it answers as usual
    pack, failed = channel.pack, list[int]()

    def fail(body: bytes, passed: Sequence[int]) -> tuple[bytes, channel.Ancillary, list[int]]:
        if len(failed) < FAILURES:
            failed.append(errno.ENOBUFS)
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return pack(body, passed)

    monkeypatch.setattr(channel, "pack", fail)
    return failed


def run_until_closed(event_loop: EventLoop, read: int) -> None:
    """Until no process has the other end of this pipe, which is closed then."""
    ended = list[bytes]()
    event_loop.watch(read, lambda: ended.append(os.read(read, 1)))
    while not ended:
        event_loop.run_once()
    assert ended == [b""]
    event_loop.unwatch(read)
    os.close(read)


def test_descriptors_are_closed_by_a_later_call_if_one_fails(
    event_loop: EventLoop, forks: ForkServer, failures: list[int]
) -> None:
    disposal, before = Disposal(event_loop, forks), descriptors()
    read, write = os.pipe2(os.O_CLOEXEC)
    disposal.add([write])
    assert len(failures) == 1, "no second call in the same turn"
    run_until_closed(event_loop, read)
    assert len(failures) == FAILURES
    while descriptors() != before:  # the process of the chore ends
        event_loop.run_once()


def test_sweep_is_made_by_a_later_call_if_one_fails(
    event_loop: EventLoop, forks: ForkServer, failures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweepers_module, "AGAIN_SECONDS", 0)
    sweepers = Sweepers(event_loop, forks)
    read, write = os.pipe2(os.O_CLOEXEC)
    sweepers.close([write])
    assert len(failures) == 1, "no second call in the same turn"
    run_until_closed(event_loop, read)
    assert len(failures) == FAILURES
    while not sweepers.is_idle:
        event_loop.run_once()
