"""The waiting room: turns between owners, and room for those who have little there."""

from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.jobs.execution import Execution
from jobworker.jobs.waiting_room import WaitingRoom

from ..strategies import examples


def job(number: int, owner: str) -> Execution:
    """All that the room looks at."""
    return _Job(number, owner)


class _Job(Execution):
    def __init__(self, number: int, owner: str) -> None:  # no task, no files
        record = SimpleNamespace(id=number, owner=owner)
        self.live_record = SimpleNamespace(record=record)  # type: ignore[assignment]


def served(room: WaitingRoom, count: int, *, at_a_time: int) -> list[int]:
    """The ids in the order in which they run; the oldest that runs ends first."""
    order, running = list[int](), list[Execution]()
    while len(order) < count:
        if len(running) == at_a_time:
            room.finished(running.pop(0).record.owner)
        execution = room.next()
        room.started(execution.record.owner)
        running.append(execution)
        order.append(execution.record.id)
    return order


def test_one_owner_is_served_in_order() -> None:
    room = WaitingRoom(100)
    for number in range(1, 8):
        room.add(job(number, "a"))
    assert served(room, 7, at_a_time=2) == [1, 2, 3, 4, 5, 6, 7]


def test_newcomer_gets_the_next_place_behind_any_queue_of_another() -> None:
    room = WaitingRoom(1000)
    for number in range(1, 131):
        room.add(job(number, "a"))
    first = served(room, 4, at_a_time=4)
    assert first == [1, 2, 3, 4]
    room.add(job(131, "b"))
    assert room.next().record.id == 131


def test_owners_share_the_places() -> None:
    room = WaitingRoom(100)
    for number in range(1, 11):
        room.add(job(number, "a"))
    for number in range(11, 16):
        room.add(job(number, "b"))
    assert served(room, 10, at_a_time=2) == [1, 11, 2, 12, 3, 13, 4, 14, 5, 15]


@examples(max_examples=100)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_everyone_is_served_once(owners: list[str], at_a_time: int) -> None:
    room = WaitingRoom(100)
    for number, owner in enumerate(owners, 1):
        room.add(job(number, owner))
    assert len(room) == len(owners)
    order = served(room, len(owners), at_a_time=at_a_time)
    assert sorted(order) == list(range(1, len(owners) + 1))
    for owner in "abc":
        mine = [number for number in order if owners[number - 1] == owner]
        assert mine == sorted(mine)
    with pytest.raises(IndexError):
        room.next()


def test_last_tenth_is_for_those_who_have_few() -> None:
    room = WaitingRoom(1000)
    for number in range(900):
        assert room.has_room_for("a", taken=len(room), arriving=0)
        room.add(job(number, "a"))
    assert not room.has_room_for("a", taken=900, arriving=0)
    for number in range(10):
        assert room.has_room_for("b", taken=900 + number, arriving=0)
        room.add(job(1000 + number, "b"))
    assert not room.has_room_for("b", taken=910, arriving=0)
    assert room.has_room_for("c", taken=910, arriving=0)
    assert not room.has_room_for("c", taken=1000, arriving=0)


def test_small_room_keeps_nothing_back() -> None:
    room = WaitingRoom(2)
    assert room.has_room_for("a", taken=1, arriving=1)
    assert not room.has_room_for("a", taken=2, arriving=0)
    assert not WaitingRoom(0).has_room_for("a", taken=0, arriving=0)


def test_job_that_is_taken_out_is_not_served() -> None:
    room = WaitingRoom(10)
    jobs = [job(number, "a") for number in range(1, 4)]
    for each in jobs:
        room.add(each)
    room.remove(jobs[0])
    assert jobs[0] not in room
    assert jobs[1] in room
    assert cast(int, room.next().record.id) == 2
    assert list(room) == [jobs[2]]
