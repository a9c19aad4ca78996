"""Which child a start gets, and when spares are made."""

import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.launcher import child_supply
from jobworker.sandbox.launcher.child import Child, PendingStart
from jobworker.sandbox.launcher.child_supply import ChildSupply
from jobworker.sandbox.launcher.ends import Ends
from jobworker.sandbox.launcher.jobs import Jobs
from jobworker.sandbox.launcher.orders import Orders
from jobworker.sandbox.launcher.reports import GIVEN_UP
from jobworker.sandbox.launcher.spares import Spares
from jobworker.sandbox.launcher.start_replies import StartReplies

from .conftest import QuietPool, StartChild, pass_turns_until
from .test_jobs import start_of


class Supplied:
    """A supply with two spares, the orders that it has given, and what was told."""

    def __init__(self, pool: QuietPool, start_child: StartChild) -> None:
        self.pool, self._start_child = pool, start_child
        self.jobs, self.spares = Jobs(pool.given), Spares(2)
        self.ordered, self.told = list[tuple[Child, int]](), list[object]()
        self.refusal: Exception | None = None
        self.unwatched, self.looked_for = False, list[Child]()
        self.cleared = list[Child]()
        ends = SimpleNamespace(
            watch=self._watch, look_for=self.looked_for.append, clear=self.cleared.append
        )
        self.supply = ChildSupply(
            pool.given,
            self.jobs,
            self.spares,
            cast("Orders", SimpleNamespace(give=self._order)),
            cast("Ends", ends),
            StartReplies(lambda message, _: self.told.append(message)),
        )
        self.far: list[socket.socket] = []

    def _watch(self, _: Child) -> None:
        if self.unwatched:
            raise OSError(errno.ENOSPC, "on purpose")

    def _order(self, child: Child, start: PendingStart) -> None:
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None
            self.jobs.kill(child)
            raise refusal
        self.ordered.append((child, start.request.job))

    def make(self, child: Child) -> Child:
        """Give a child that was asked for its process."""
        self.far.append(self.pool.answer(child, self._start_child()))
        return child

    def next_spare(self) -> Child:
        """The spare that is asked for next."""
        before = len(self.pool.asked)
        pass_turns_until(self.pool.event_loop, lambda: len(self.pool.asked) > before)
        child, order = self.pool.asked[-1]
        assert order is None
        return child


@pytest.fixture
def supplied(pool: QuietPool, start_child: StartChild) -> Iterator[Supplied]:
    made = Supplied(pool, start_child)
    yield made
    for far in made.far:
        far.close()
    for child, _ in pool.asked:
        if child.sock is not None:
            child.sock.close()
        if child.order >= 0:
            os.close(child.order)


def test_spares_are_made_one_after_the_other(supplied: Supplied) -> None:
    for _ in range(2):
        child = supplied.next_spare()
        assert child not in supplied.spares
        supplied.make(child)
        assert child in supplied.spares
    assert not supplied.spares.needs_another


def test_start_takes_a_spare_and_another_one_is_made(supplied: Supplied) -> None:
    spare = supplied.make(supplied.next_spare())
    supplied.make(supplied.next_spare())
    loop, refill = supplied.pool.event_loop, supplied.supply._refill
    pass_turns_until(loop, lambda: not loop.is_scheduled(refill))
    assert supplied.supply.give(start_of(1))
    assert supplied.ordered == [(spare, 1)]
    assert supplied.jobs.find(1) is spare
    assert spare.request == 7
    supplied.next_spare()


def test_start_gets_the_spare_that_is_being_made(supplied: Supplied) -> None:
    spare = supplied.next_spare()
    assert supplied.supply.give(start_of(1))
    assert supplied.jobs.find(1) is spare
    assert not supplied.ordered
    supplied.make(spare)
    assert supplied.ordered == [(spare, 1)]
    assert spare not in supplied.spares


def test_start_that_no_spare_fits_gets_a_child_of_its_own(supplied: Supplied) -> None:
    supplied.make(supplied.next_spare())
    start = start_of(1)
    order = start.request.order._replace(network="none")
    start = start._replace(request=start.request._replace(order=order))
    assert supplied.supply.give(start)
    child, asked = supplied.pool.asked[-1]
    assert asked == order
    assert supplied.jobs.find(1) is child
    supplied.make(child)
    assert supplied.ordered == [(child, 1)]


def _end(spare: Child, _: Supplied) -> None:
    signal.pidfd_send_signal(spare.pidfd, signal.SIGKILL)
    while not spare.has_ended():
        pass


def _refuse(_: Child, supplied: Supplied) -> None:
    supplied.refusal = BrokenPipeError(errno.EPIPE, "on purpose")


def _lose_writes(spare: Child, _: Supplied) -> None:
    spare.root = -7


@pytest.mark.parametrize("spoil", [_end, _refuse, _lose_writes])
def test_spare_that_is_no_good_is_left_out(
    supplied: Supplied,
    spoil: Callable[[Child, Supplied], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(disk_images, "lost_writes", lambda root: root == -7)
    bad, good = (supplied.make(supplied.next_spare()) for _ in range(2))
    spoil(bad, supplied)
    assert supplied.supply.give(start_of(1))
    assert supplied.jobs.find(1) is good
    assert bad not in supplied.spares
    assert bad.job is None
    bad.root = None


def test_start_waits_for_a_slot_only_if_one_is_about_to_be_free(supplied: Supplied) -> None:
    order, own = (start_of(1).request.order._replace(network=each) for each in ("host", "none"))
    spare = supplied.make(supplied.next_spare())
    supplied.pool.free = 0
    assert not supplied.supply.must_wait(own), "no slot will be free: it is refused"
    supplied.jobs.kill(spare)
    assert supplied.supply.must_wait(own)
    assert not supplied.supply.must_wait(order), "there is a spare"
    supplied.spares.discard(spare)
    assert supplied.supply.must_wait(order)
    supplied.pool.free = 1
    assert not supplied.supply.must_wait(own), "a slot is free"


def test_start_waits_for_the_slots_of_bad_spares(
    supplied: Supplied, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_images, "lost_writes", lambda root: root == -7)
    spare = supplied.make(supplied.next_spare())
    spare.root, supplied.pool.free = -7, 0
    assert not supplied.supply.give(start_of(1))
    assert spare.doomed
    assert supplied.jobs.find(1) is None
    spare.root = None


def test_start_whose_child_cannot_be_made_fails_when_its_slot_is_free(supplied: Supplied) -> None:
    assert supplied.supply.give(start_of(1))
    child = supplied.pool.asked[-1][0]
    supplied.pool.refuse(child, {"errno": errno.EAGAIN, "detail": "on purpose"})
    assert supplied.cleared == [child]
    assert supplied.jobs.find(1) is None
    assert not supplied.told
    supplied.jobs.discard(child)
    supplied.jobs.tell_cleared(child)
    error = {"step": "start", "errno": errno.EAGAIN, "detail": "on purpose"}
    (told,) = supplied.told
    assert isinstance(told, dict)
    assert told["id"] == 7
    assert {**told["error"], "step": "start"} == error


def test_child_of_a_start_that_was_given_up_is_killed_once_it_is_made(supplied: Supplied) -> None:
    assert supplied.supply.give(start_of(1))
    child = supplied.pool.asked[-1][0]
    supplied.jobs.kill(child)
    supplied.make(child)
    assert child.failure == GIVEN_UP
    assert not supplied.ordered


def test_child_that_cannot_be_watched_is_killed_and_looked_for(supplied: Supplied) -> None:
    supplied.unwatched = True
    assert supplied.supply.give(start_of(1))
    child = supplied.make(supplied.pool.asked[-1][0])
    assert supplied.looked_for == [child]
    assert child.doomed
    assert child.failure is not None
    assert "on purpose" in str(child.failure["detail"])
    assert not supplied.ordered


def test_order_that_meets_an_unforeseen_fault_fails_its_start(supplied: Supplied) -> None:
    assert supplied.supply.give(start_of(1))
    supplied.refusal = KeyError("unforeseen")
    child = supplied.make(supplied.pool.asked[-1][0])
    assert child.doomed
    assert "incident" in str(child.failure)


def test_no_spare_is_made_after_the_end(supplied: Supplied, pool: QuietPool) -> None:
    supplied.supply.close()
    later = list[bool]()
    pool.event_loop.call_later(2 * child_supply.REFILL_SECONDS, lambda: later.append(True))
    assert not supplied.spares.needs_another
    pass_turns_until(pool.event_loop, lambda: later)
    assert not pool.asked
