"""Slots for what is large: bounded in all and for each name, and given in turn."""

import math

import pytest
import trio
import trio.testing

from jobworker.errors import TooSlow
from jobworker.server.fairness.fair_scheduling import ActiveClients
from jobworker.server.fairness.slots import (
    LARGE_BYTES,
    LEAST_BYTES_PER_SECOND,
    Slots,
    SlotStatistics,
)
from jobworker.server.requests.read_backpressure import ReadBackpressure


async def test_a_name_has_its_part_and_waits_for_itself_alone() -> None:
    slots = Slots(in_all=3, for_each=2)
    assert slots.acquire_nowait("greedy")
    assert slots.acquire_nowait("greedy")
    assert not slots.acquire_nowait("greedy")
    with trio.fail_after(1):
        await slots.acquire("quiet")
    assert not slots.acquire_nowait("third")
    assert slots.statistics() == SlotStatistics(taken=3, waiting=0)


async def test_last_quarter_is_for_names_that_have_none() -> None:
    slots = Slots(in_all=16, for_each=4)
    for name in ("a", "b", "c", "d"):
        while slots.acquire_nowait(name):
            pass
    assert slots.statistics().taken == 13
    assert [slots.acquire_nowait(name) for name in "defgh"] == [False, True, True, True, False]


async def test_name_that_gave_its_only_slot_back_may_have_one_of_the_last_quarter() -> None:
    slots = Slots(in_all=16, for_each=4)
    for name in ("a", "d", "b", "b", "b", "b", "c", "c", "c", "c", "e", "e"):
        assert slots.acquire_nowait(name)
    async with trio.open_nursery() as nursery:
        for name in ("d", "a"):
            nursery.start_soon(slots.acquire, name)
            await trio.testing.wait_all_tasks_blocked()
        slots.release("a")
        with trio.move_on_after(1):
            while slots.statistics().waiting:
                await trio.lowlevel.checkpoint()
        assert slots.statistics() == SlotStatistics(taken=13, waiting=0)


async def test_free_slot_goes_to_the_first_that_may_have_it(autojump_clock: object) -> None:
    slots = Slots(in_all=2, for_each=1)
    order = list[str]()

    async def have(name: str) -> None:
        async with slots.slot(name):
            order.append(name)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for name in ("a", "a", "b", "c"):
            nursery.start_soon(have, name)
            await trio.testing.wait_all_tasks_blocked()
    assert order in (["a", "b", "a", "c"], ["a", "b", "c", "a"])
    assert slots.statistics() == SlotStatistics(taken=0, waiting=0)


async def test_who_gives_up_leaves_no_slot_behind(autojump_clock: object) -> None:
    async def have(name: str) -> None:
        async with slots.slot(name):
            await trio.sleep_forever()

    slots = Slots(in_all=1, for_each=1)
    await slots.acquire("a")
    with trio.move_on_after(1):
        await slots.acquire("b")
    assert slots.statistics() == SlotStatistics(taken=1, waiting=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(have, "b")
        await trio.testing.wait_all_tasks_blocked()
        slots.release("a")  # it is b's now, which is cancelled before it hears of it
        nursery.cancel_scope.cancel()
    assert slots.statistics().waiting == 0
    assert slots.statistics().taken == 0


async def test_large_message_takes_a_slot_until_it_is_served(autojump_clock: object) -> None:
    slots = Slots(in_all=1, for_each=1)
    one, other = (
        ReadBackpressure(slots, "a", 60, ActiveClients()),
        ReadBackpressure(slots, "a", 60, ActiveClients()),
    )
    assert await one.wait_for_room(LARGE_BYTES) == math.inf
    assert await one.wait_for_room(LARGE_BYTES + 1) == 60
    assert await other.wait_for_room(LARGE_BYTES) == math.inf
    with pytest.raises(trio.TooSlowError), trio.fail_after(5):
        await other.wait_for_room(LARGE_BYTES + 1)
    one.begin()
    with pytest.raises(trio.TooSlowError), trio.fail_after(5):
        await one.wait_for_room(0)  # nothing more is read meanwhile
    one.end()
    assert await one.wait_for_room(0) == math.inf
    assert await other.wait_for_room(LARGE_BYTES + 1) == 60
    other.close()
    assert slots.statistics() == SlotStatistics(taken=0, waiting=0)


async def test_connection_that_ends_while_it_waits_keeps_no_slot(autojump_clock: object) -> None:
    slots = Slots(in_all=1, for_each=1)
    await slots.acquire("a")
    waiting = ReadBackpressure(slots, "a", 60, ActiveClients())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.wait_for_room, LARGE_BYTES + 1)
        await trio.testing.wait_all_tasks_blocked()
        waiting.close()
        slots.release("a")
    assert slots.statistics() == SlotStatistics(taken=0, waiting=0)


async def test_slot_that_is_given_to_who_was_just_cancelled_is_not_lost() -> None:
    slots = Slots(1, 1)
    await slots.acquire("a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slots.acquire, "a")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        slots.release("a")
    assert slots.acquire_nowait("a")


@pytest.mark.parametrize("is_wanted", [False, True])
async def test_slot_is_held_for_a_bounded_time_where_somebody_waits(
    autojump_clock: object, nursery: trio.Nursery, is_wanted: bool
) -> None:
    slots = Slots(1, 1)
    backpressure, size = ReadBackpressure(slots, "a", 60, ActiveClients()), LARGE_BYTES + 1
    began = trio.current_time()
    await backpressure.wait_for_room(size)
    if is_wanted:
        nursery.start_soon(slots.acquire, "b")
    too_slow: TooSlow | None = None
    while too_slow is None and trio.current_time() < began + 1000:
        try:
            assert await backpressure.wait_for_room(size) <= 60
        except TooSlow as raised:
            too_slow = raised
        await trio.sleep(0.5)
        size += LEAST_BYTES_PER_SECOND // 4
    nursery.cancel_scope.cancel()
    if is_wanted:
        assert "65536 bytes a second" in str(too_slow)
        assert trio.current_time() - began == pytest.approx(120, abs=1)
    else:
        assert too_slow is None


def test_slot_stands_in_the_way_of_who_could_have_it_alone() -> None:
    slots = Slots(in_all=2, for_each=1)
    assert slots.acquire_nowait("a")
    assert slots.acquire_nowait("b")
    assert not slots.are_wanted_of("a")
    slots._waiting.append(("a", trio.Event()))
    assert slots.are_wanted_of("a")
    assert not slots.are_wanted_of("b"), "it waits for a slot of its own"
    slots._waiting.append(("c", trio.Event()))
    assert slots.are_wanted_of("b")


async def test_message_that_comes_at_a_rate_has_its_time(
    autojump_clock: object, nursery: trio.Nursery
) -> None:
    slots = Slots(1, 1)
    backpressure, size = ReadBackpressure(slots, "a", 60, ActiveClients()), LARGE_BYTES + 1
    await backpressure.wait_for_room(size)
    nursery.start_soon(slots.acquire, "b")
    for _ in range(1000):
        assert await backpressure.wait_for_room(size) > 0
        await trio.sleep(1)
        size += LEAST_BYTES_PER_SECOND
    await trio.sleep(60)  # and may not pause
    with pytest.raises(TooSlow, match="the client sent nothing for 60 s"):
        await backpressure.wait_for_room(size - LEAST_BYTES_PER_SECOND)
    nursery.cancel_scope.cancel()


async def test_reading_is_paused_while_a_slot_is_waited_for(autojump_clock: object) -> None:
    slots = Slots(1, 1)
    await slots.acquire("a")
    backpressure = ReadBackpressure(slots, "a", 60, ActiveClients())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backpressure.wait_for_room, LARGE_BYTES + 1)
        await trio.testing.wait_all_tasks_blocked()
        assert (backpressure.paused, backpressure.pauses) == (True, 0)
        slots.release("a")
    assert (backpressure.paused, backpressure.pauses) == (False, 1)
