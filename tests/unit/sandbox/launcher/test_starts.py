"""Starts that wait for a slot, that are given up, and that a service leaves behind."""

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest

from jobworker.errors import SandboxError
from jobworker.sandbox import channel
from jobworker.sandbox import event_loop as event_loop_module
from jobworker.sandbox.launcher import held_starts
from jobworker.sandbox.launcher import starts as starts_module
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.jobs import Jobs
from jobworker.sandbox.launcher.reports import GIVEN_UP, MAY_HAVE_RUN, TOO_LITTLE_MEMORY
from jobworker.sandbox.launcher.starts import Starts

from .conftest import QuietPool, StartChild, new_child, pass_turns_until
from .test_jobs import start_of


class Begun:
    """Starts without spares, and what was told of them."""

    def __init__(self, pool: QuietPool) -> None:
        self.pool, self.jobs = pool, Jobs(pool.given)
        self.told = list[channel.Message]()
        self.starts = Starts(pool.given, self.jobs, 0, self._tell, -1)

    def _tell(self, message: channel.Message, _: Sequence[int]) -> None:
        self.told.append(message)

    def spawn(self, job: int) -> None:
        """Ask for the start of a job, by the request number of 100 more."""
        self.starts.spawn(100 + job, start_of(job).request)

    def fill(self) -> list[Child]:
        """Have every slot taken by a start: their children."""
        for job in range(1, self.pool.slots + 1):
            self.spawn(job)
        return [child for child, _ in self.pool.asked]

    def look(self, seconds: float) -> None:
        """Have the starts looked at as often as in so many seconds."""
        for _ in range(round(seconds / starts_module.LOOK_AT_STARTS_SECONDS)):
            self.starts._look_at_starts()


@pytest.fixture
def begun(pool: QuietPool, monkeypatch: pytest.MonkeyPatch) -> Begun:
    monkeypatch.setattr(starts_module, "KernelWatch", lambda *_: SimpleNamespace(wake=lambda: None))
    return Begun(pool)


def test_id_that_is_in_use_is_refused(begun: Begun) -> None:
    begun.spawn(1)
    with pytest.raises(SandboxError) as raised:
        begun.spawn(1)
    assert raised.value.data["errno"] == errno.EEXIST


def test_start_beyond_the_slots_is_refused_and_is_not_executed(begun: Begun) -> None:
    begun.fill()
    with pytest.raises(SandboxError, match="every place is in use"):
        begun.spawn(4)
    assert begun.jobs.unstarted == [1, 2, 3, 4]


def wait_for_a_slot(begun: Begun, job: int = 4) -> Child:
    """Have a start wait for the slot of a removed job: that job's child."""
    child, *_ = begun.fill()
    begun.jobs.remove(child)
    begun.spawn(job)
    assert len(begun.pool.asked) == 3
    return child


def test_start_that_waits_gets_the_slot_of_an_ended_child(begun: Begun) -> None:
    child = wait_for_a_slot(begun)
    begun.pool.refuse(child, {"errno": errno.EAGAIN})
    begun.pool.end_clearing(child)
    assert begun.jobs.find(4) is begun.pool.asked[-1][0]
    assert [told["id"] for told in begun.told] == [101]


def test_start_that_waits_is_refused_with_its_reason_where_it_fails(
    begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Child:
        raise OSError(errno.ENOMEM, "on purpose")

    child = wait_for_a_slot(begun)
    monkeypatch.setattr(begun.pool, "make", refuse)
    begun.pool.refuse(child, {"errno": errno.EAGAIN})
    begun.pool.end_clearing(child)
    removed, refused = begun.told
    assert (removed["id"], refused["id"]) == (101, 104)
    assert "on purpose" in str(refused["error"])


def test_start_that_waits_is_given_up(begun: Begun) -> None:
    wait_for_a_slot(begun)
    assert begun.starts.give_up(4)
    assert begun.told == [{"id": 104, "error": GIVEN_UP}]
    assert not begun.starts.give_up(4)


def test_start_that_waits_for_too_long_is_refused(begun: Begun) -> None:
    wait_for_a_slot(begun)
    begun.look(starts_module.START_SECONDS - 1)
    assert not begun.told
    begun.look(1)
    assert begun.told[0]["id"] == 104
    assert "no place became free within 30 s" in str(begun.told[0]["error"])


def test_start_that_takes_too_long_is_told_when_its_child_is_cleared(begun: Begun) -> None:
    begun.spawn(1)
    child = begun.pool.asked[0][0]
    begun.look(starts_module.START_SECONDS)
    assert child.doomed
    assert not begun.told
    begun.pool.refuse(child, {"errno": errno.ECANCELED})
    begun.pool.end_clearing(child)
    (told,) = begun.told
    assert told["id"] == 101
    assert "its sandbox was not made within 30 s" in str(told["error"])


def test_failed_start_that_cannot_be_cleared_is_told_after_a_while(begun: Begun) -> None:
    begun.spawn(1)
    child = begun.pool.asked[0][0]
    assert begun.starts.give_up(1)
    begun.look(starts_module.GIVE_UP_SECONDS - 0.5)
    assert not begun.told
    begun.look(0.5)
    assert begun.told == [{"id": 101, "error": GIVEN_UP}]
    assert begun.jobs.find(1) is None
    assert child in begun.jobs.children, "its slot stays taken"


def test_start_whose_program_may_run_is_not_told_as_unstarted(
    begun: Begun, start_child: StartChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_starts, "hold", lambda _: False)
    begun.spawn(1)
    child = begun.pool.asked[0][0]
    with begun.pool.answer(child, start_child()):
        assert begun.starts.give_up(1)
    assert child.failure == MAY_HAVE_RUN
    assert begun.jobs.unstarted == []
    os.close(child.order)
    assert child.sock is not None
    child.sock.close()


def test_start_that_ends_for_want_of_memory_says_so(begun: Begun) -> None:
    begun.spawn(1)
    child = begun.pool.asked[0][0]
    child.final_want = "limit"
    begun.starts._on_failed(child)
    assert child.failure == TOO_LITTLE_MEMORY
    assert child.when_cleared is not None
    child.when_cleared()
    assert begun.told == [{"id": 101, "error": TOO_LITTLE_MEMORY}]


def test_no_start_is_left_waiting_where_the_launcher_leaves(begun: Begun) -> None:
    child = wait_for_a_slot(begun)
    begun.starts.close()
    begun.jobs.remove_all()
    begun.pool.refuse(child, {"errno": errno.EAGAIN})
    begun.pool.end_clearing(child)
    assert len(begun.pool.asked) == 3
    assert begun.jobs.count == 0


@pytest.fixture
def undone(
    begun: Begun, start_child: StartChild, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Child]:
    """A start, of job 1, that could not be undone at the first try when its service went."""
    monkeypatch.setattr(event_loop_module, "AGAIN_SECONDS", 0)
    struck = list[Child]()

    def hold(child: Child, hold: Callable[[Child], bool] = held_starts.hold) -> bool:
        if not struck:
            struck.append(child)
            raise KeyError("unforeseen")
        return hold(child)

    monkeypatch.setattr(held_starts, "hold", hold)
    child = start_child()
    begun.jobs.remember_unstarted(1)
    begun.jobs.add(child)
    begun.jobs.become(child, start_of(1))
    begun.starts.undo_all()
    assert struck == [child]
    assert begun.jobs.find(1) is child
    assert not begun.jobs.started_after(0)
    yield child
    if child.sock is not None:
        child.sock.close()


def test_start_whose_undoing_failed_is_undone_later(begun: Begun, undone: Child) -> None:
    pass_turns_until(begun.pool.event_loop, lambda: begun.jobs.find(1) is None)
    assert undone.doomed
    assert begun.jobs.unstarted == [1]
    assert not begun.told


def test_start_that_fails_before_it_could_be_undone_is_not_told_to_the_next_service(
    begun: Begun, undone: Child
) -> None:
    begun.starts._on_failed(undone)
    assert undone.when_cleared is not None
    undone.when_cleared()
    assert not begun.told
    assert undone.request is None


def test_program_that_runs_before_its_start_could_be_undone_goes_on_and_is_not_told_of(
    begun: Begun, undone: Child
) -> None:
    undone.sock, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.close()
    undone.ready = True
    pass_turns_until(begun.pool.event_loop, lambda: undone.request is None)
    assert begun.jobs.started_after(0) == [undone]
    assert begun.jobs.unstarted == []
    assert not undone.doomed
    assert not begun.told


def test_removal_that_the_gone_service_waits_for_is_answered_to_no_one(begun: Begun) -> None:
    child, told = new_child(1), list[str]()
    begun.jobs.add(child)
    child.when_cleared = lambda: told.append("free")
    begun.starts.undo_all()
    begun.jobs.discard(child)
    begun.jobs.tell_cleared(child)
    assert not told
