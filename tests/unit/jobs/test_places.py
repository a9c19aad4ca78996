"""Which job runs, which waits, and which is refused for want of room."""

from types import SimpleNamespace

import pytest
import trio
import trio.testing

from jobworker.errors import Busy
from jobworker.jobs.execution import Execution
from jobworker.jobs.places import Places


class _Job(Execution):
    def __init__(self, number: int, owner: str, *, at_once: bool) -> None:  # no task, no files
        record = SimpleNamespace(id=number, owner=owner)
        self.live_record = SimpleNamespace(record=record)  # type: ignore[assignment]
        self.admitted_at_once = at_once


def admitted(places: Places, number: int, owner: str = "alice") -> Execution:
    """A job that comes in, and is queued at once."""
    places.check_room(owner, arriving=0)
    at_once = places.take()
    places.keep_promise(at_once)
    job = _Job(number, owner, at_once=at_once)
    places.queue(job)
    return job


async def test_jobs_run_in_order_as_places_become_free() -> None:
    places = Places(max_running=2, max_waiting=10)
    jobs = [admitted(places, number) for number in range(1, 5)]
    assert [job.admitted_at_once for job in jobs] == [True, True, False, False]
    assert [await places.next(), await places.next()] == jobs[:2]
    with trio.move_on_after(0.01) as scope:
        await places.next()
    assert scope.cancelled_caught, "a third one runs"
    places.finished(jobs[1])
    places.give_back()
    assert await places.next() is jobs[2]


async def test_next_wakes_for_a_job_and_for_a_place(autojump_clock: trio.testing.MockClock) -> None:
    places, ran = Places(max_running=1, max_waiting=10), list[Execution]()

    async def run() -> None:
        while True:
            ran.append(await places.next())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        first = admitted(places, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert ran == [first]
        second = admitted(places, 2)
        await trio.testing.wait_all_tasks_blocked()
        assert ran == [first]
        places.finished(first)
        await trio.testing.wait_all_tasks_blocked()
        assert ran == [first, second]
        third = admitted(places, 3)
        await trio.testing.wait_all_tasks_blocked()
        places.end_without_a_place(third)
        await trio.testing.wait_all_tasks_blocked()
        assert ran == [first, second, third]
        nursery.cancel_scope.cancel()


async def test_promised_place_is_kept_for_the_job_that_arrives() -> None:
    places = Places(max_running=1, max_waiting=10)
    assert places.take(), "the first is admitted to run at once, and has no files yet"
    second = admitted(places, 2)
    assert not second.admitted_at_once
    with trio.move_on_after(0.01) as scope:
        await places.next()
    assert scope.cancelled_caught, "the second has overtaken the first"
    places.keep_promise(at_once=True)
    places.give_back()  # the first did not arrive
    assert await places.next() is second


def test_refusal_says_what_is_full_and_what_helps() -> None:
    places = Places(max_running=1, max_waiting=2)
    for number in range(1, 4):
        admitted(places, number)
    with pytest.raises(Busy, match="1 jobs run and 2 wait already") as refused:
        places.check_room("bob", arriving=0)
    assert "max_waiting_jobs" in refused.value.remedy


def test_jobs_that_arrive_count_for_their_owner() -> None:
    """The last tenth of the room is for owners with few waiting jobs."""
    places = Places(max_running=1, max_waiting=10)
    for number in range(1, 11):
        admitted(places, number)
    with pytest.raises(Busy, match="the last places are for clients with few waiting jobs"):
        places.check_room("alice", arriving=0)
    places.check_room("bob", arriving=0)
    with pytest.raises(Busy):
        places.check_room("bob", arriving=9)


async def test_waiting_job_that_is_to_end_needs_no_place() -> None:
    places = Places(max_running=1, max_waiting=10)
    first, _, third = (admitted(places, number) for number in range(1, 4))
    assert await places.next() is first
    places.end_without_a_place(third)
    assert await places.next() is third
    places.end_without_a_place(first)  # it runs: nothing changes
    with trio.move_on_after(0.01) as scope:
        await places.next()
    assert scope.cancelled_caught


async def test_waiting_jobs_are_taken_out_once() -> None:
    places = Places(max_running=1, max_waiting=10)
    first, *waiting = [admitted(places, number) for number in range(1, 4)]
    assert list(places.take_out_waiting()) == waiting
    assert list(places.take_out_waiting()) == []
    assert await places.next() is first
