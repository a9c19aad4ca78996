"""What the launcher does when a child or its gateway ends."""

import errno
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox.channel import Message
from jobworker.sandbox.launcher.child import Child, ChildExit
from jobworker.sandbox.launcher.child_messages import ChildMessages
from jobworker.sandbox.launcher.ends import Ends
from jobworker.sandbox.launcher.jobs import Jobs
from jobworker.sandbox.launcher.reports import DIED
from jobworker.sandbox.launcher.walls import Walls

from .conftest import QuietPool, StartChild, new_child, pass_turns_until
from .test_jobs import start_of


class Taken:
    """Ends of children, and what they have led to."""

    def __init__(self, pool: QuietPool) -> None:
        self.pool, self.jobs = pool, Jobs(pool.given)
        self.told = list[Message]()
        self.read, self.failed = list[Child](), list[Child]()
        self.networks_ended = list[str]()
        self.free_slots = 0
        messages = cast("ChildMessages", SimpleNamespace(read=self._read))
        walls = SimpleNamespace(tell_end=lambda _, how: self.networks_ended.append(how))
        self.ends = Ends(
            pool.given,
            self.jobs,
            messages,
            cast("Walls", walls),
            self._tell,
            self.failed.append,
            self._on_slot_free,
        )
        self._socks: list[socket.socket] = []

    def _tell(self, message: Message, descriptors: Sequence[int]) -> None:
        assert not descriptors
        self.told.append(message)

    def _read(self, child: Child) -> None:
        self.read.append(child)

    def _on_slot_free(self) -> None:
        self.free_slots += 1

    def job(self, child: Child) -> Child:
        """Have a child be the job of its index, whose program runs."""
        self.jobs.add(child)
        self.jobs.become(child, start_of(child.index))
        child.request = None
        return child

    def watch(self, child: Child) -> None:
        child.sock, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socks += [child.sock, far]
        self.ends.watch(child)

    def pass_turns_until_clearing(self, child: Child) -> None:
        pass_turns_until(self.pool.event_loop, lambda: child in self.pool.clearing)

    def close(self) -> None:
        for sock in self._socks:
            sock.close()


@pytest.fixture
def taken(pool: QuietPool) -> Iterator[Taken]:
    made = Taken(pool)
    yield made
    made.close()


def test_end_of_a_job_is_told_and_its_slot_is_free_when_it_is_cleared(
    taken: Taken, start_child: StartChild
) -> None:
    child = taken.job(start_child("sh", "-c", "exit 3"))
    taken.watch(child)
    taken.pass_turns_until_clearing(child)
    ((ended),) = taken.told
    assert (ended["event"], ended["job"], ended["code"]) == ("exit", child.index, 3)
    assert child.end_is_known
    assert taken.read == [child], "its last messages"
    assert taken.free_slots == 0
    taken.pool.end_clearing(child)
    assert taken.free_slots == 1
    assert child not in taken.jobs.children
    assert taken.jobs.find(child.index) is child, "it is kept until its removal"


def test_child_that_ends_before_its_program_is_a_failed_start_and_tells_no_end(
    taken: Taken, start_child: StartChild
) -> None:
    child = taken.job(start_child("true"))
    child.request = 7
    taken.watch(child)
    taken.pass_turns_until_clearing(child)
    assert taken.failed == [child]
    assert not taken.told


def test_spare_that_ends_tells_nobody(
    taken: Taken, start_child: StartChild, capfd: pytest.CaptureFixture[str]
) -> None:
    child = start_child("true")
    taken.jobs.add(child)
    child.order, child.failure = os.memfd_create("order", os.MFD_CLOEXEC), {"step": "prepare"}
    taken.watch(child)
    taken.pass_turns_until_clearing(child)
    assert not taken.told
    assert not taken.failed
    assert "a spare failed" in capfd.readouterr().err
    os.close(child.order)


def test_spare_that_the_launcher_has_killed_has_not_failed(
    taken: Taken, start_child: StartChild, capfd: pytest.CaptureFixture[str]
) -> None:
    child = start_child("sleep", "100")
    taken.jobs.add(child)
    child.order, child.failure = (
        os.memfd_create("order", os.MFD_CLOEXEC),
        DIED,
    )  # as its messages end
    taken.watch(child)
    taken.jobs.kill(child)
    taken.pass_turns_until_clearing(child)
    assert "a spare failed" not in capfd.readouterr().err
    os.close(child.order)


def test_child_is_cleared_when_its_gateway_has_ended_too(
    taken: Taken, start_child: StartChild
) -> None:
    child, beside = taken.job(new_child(1)), start_child()
    child.exit, child.end_is_taken = ChildExit(0, None), True
    child.gateway = os.dup(beside.pidfd)
    taken.ends.look_for(child)
    taken.ends.clear(child)
    assert not taken.pool.clearing
    signal.pidfd_send_signal(beside.pidfd, signal.SIGKILL)
    taken.pass_turns_until_clearing(child)
    assert child.gateway is None
    assert not taken.networks_ended, "the job has ended before"


def test_end_of_a_gateway_alone_is_told(taken: Taken, start_child: StartChild) -> None:
    child, beside = taken.job(start_child()), start_child()
    child.gateway = os.dup(beside.pidfd)
    taken.watch(child)
    signal.pidfd_send_signal(beside.pidfd, signal.SIGKILL)
    pass_turns_until(taken.pool.event_loop, lambda: taken.networks_ended)
    assert child.gateway is None
    assert child not in taken.pool.clearing
    assert "signal 9" in taken.networks_ended[0]


def test_end_that_cannot_be_watched_is_looked_for(
    taken: Taken, start_child: StartChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "on purpose")

    child = taken.job(start_child("sleep", "0.05"))
    with monkeypatch.context() as without:
        without.setattr(taken.pool.event_loop, "watch", refuse)
        with pytest.raises(OSError, match="on purpose"):
            taken.watch(child)
    taken.ends.look_for(child)
    taken.pass_turns_until_clearing(child)
    assert [word["event"] for word in taken.told] == ["exit"]


def test_child_is_cleared_once(taken: Taken) -> None:
    child = taken.job(new_child(1))
    taken.ends.clear(child)
    assert not taken.pool.clearing, "its end is not taken yet"
    child.end_is_taken = True
    taken.ends.clear(child)
    taken.pool.end_clearing(child)
    taken.ends.clear(child)
    assert not taken.pool.clearing
    assert taken.free_slots == 1
