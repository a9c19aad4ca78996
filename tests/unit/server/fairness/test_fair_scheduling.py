"""Of one name a few pass at a time; others pass by."""

import threading
import time
from collections import Counter

import pytest
import trio
import trio.testing

from jobworker.server.fairness.fair_scheduling import (
    BURST_SECONDS,
    LONG_WORK_BURST_SECONDS,
    LONG_WORK_SHARE,
    MAX_REST_SECONDS,
    RECENT_SECONDS,
    REST,
    WAITING_SECONDS,
    ActiveClients,
    FairScheduler,
    FairThreadPool,
)

MOST = 4
SOON = 20
"""Seconds of real time: more than a busy host takes."""


async def test_many_of_one_name_leave_each_turn_to_others() -> None:
    scheduler, order = FairScheduler(MOST, ActiveClients()), list[str]()

    async def enter(name: str) -> None:
        await scheduler.wait_turn(name)
        order.append(name)

    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(enter, "flood")
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        nursery.start_soon(enter, "quiet")
    assert order.count("flood") == 200
    assert order.index("quiet") <= 5 * MOST


class Turns(trio.abc.Instrument):
    """Counts the turns of the event loop: it looks for I/O once in each."""

    now = 0

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - as trio calls it
        """See trio.abc.Instrument."""
        self.now += 1


async def test_what_passes_in_a_turn_is_bounded_by_its_cost_and_shared_by_the_names() -> None:
    scheduler, turns, passed = (
        FairScheduler(64, ActiveClients()),
        Turns(),
        Counter[tuple[int, str]](),
    )

    async def enter(name: str, cost: int) -> None:
        await scheduler.wait_turn(name, cost)
        passed[turns.now, name] += cost

    trio.lowlevel.add_instrument(turns)
    async with trio.open_nursery() as nursery:
        for name, cost in (("small", 1), ("medium", 8)):
            for _ in range(1600 // cost):
                nursery.start_soon(enter, name, cost)
    trio.lowlevel.remove_instrument(turns)
    later = sorted(turn for turn, _ in passed)[2:]
    assert later, "the control: it took several turns"
    assert all(passed[turn, name] <= 32 for turn in later for name in ("small", "medium"))
    assert sum(passed.values()) == 3200


@pytest.mark.parametrize(("asks", "most"), [(None, 4 * MOST), ("flood", 4 * MOST), ("quiet", MOST)])
async def test_more_passes_in_a_turn_while_no_others_are_about(
    asks: str | None, most: int, autojump_clock: trio.testing.MockClock
) -> None:
    active_clients, turns, passed = ActiveClients(), Turns(), Counter[int]()
    scheduler = FairScheduler(MOST, active_clients, alone=4)
    if asks is not None:
        active_clients.mark_active(asks)

    async def enter() -> None:
        await scheduler.wait_turn("flood")
        passed[turns.now] += 1

    trio.lowlevel.add_instrument(turns)
    async with trio.open_nursery() as nursery:
        for _ in range(12 * MOST):
            nursery.start_soon(enter)
    trio.lowlevel.remove_instrument(turns)
    assert autojump_clock.current_time() < RECENT_SECONDS, "the control: who asked is still about"
    assert max(passed.values()) == most


async def test_one_that_costs_more_than_all_may_passes_alone() -> None:
    scheduler = FairScheduler(MOST, ActiveClients())
    for _ in range(10):
        await scheduler.wait_turn("name", 100 * MOST)


async def test_who_comes_alone_does_not_wait() -> None:
    scheduler = FairScheduler(MOST, ActiveClients())
    for _ in range(3):
        with trio.CancelScope() as scope:
            scope.cancel()
            await scheduler.wait_turn("one")  # has no checkpoint
        assert not scope.cancelled_caught


async def test_who_is_cancelled_holds_up_nobody() -> None:
    scheduler, entered = FairScheduler(MOST, ActiveClients()), list[int]()

    async def enter(number: int) -> None:
        await scheduler.wait_turn("name")
        entered.append(number)

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as others:
                for number in range(50):
                    others.start_soon(enter, number)
                scope.cancel()
        for number in range(100, 150):
            nursery.start_soon(enter, number)
    assert set(range(100, 150)) <= set(entered)


async def test_what_a_turn_has_set_going_ends_before_the_next_begins(
    mock_clock: trio.testing.MockClock,
) -> None:
    active_clients = ActiveClients()
    scheduler, active, most_active = FairScheduler(MOST, active_clients), 0, 0
    active_clients.mark_active("quiet")

    async def request() -> None:
        nonlocal active, most_active
        await scheduler.wait_turn("flood")
        active += 1
        most_active = max(most_active, active)
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        active -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(10 * MOST):
            nursery.start_soon(request)
    assert mock_clock.current_time() == 0, "the control: the bound on a busy loop was not reached"
    assert most_active == MOST


async def test_who_is_alone_waits_for_nothing(mock_clock: trio.testing.MockClock) -> None:
    active_clients, turns = ActiveClients(), Turns()
    scheduler = FairScheduler(MOST, active_clients)
    active_clients.mark_active("flood")

    async def request() -> None:
        await scheduler.wait_turn("flood")
        for _ in range(10):
            await trio.lowlevel.checkpoint()

    trio.lowlevel.add_instrument(turns)
    async with trio.open_nursery() as nursery:
        for _ in range(10 * MOST):
            nursery.start_soon(request)
    trio.lowlevel.remove_instrument(turns)
    assert turns.now < 10 + 3 * 10


async def test_a_busy_loop_keeps_nobody_waiting_for_good(
    autojump_clock: trio.testing.MockClock,
) -> None:
    active_clients = ActiveClients()
    scheduler = FairScheduler(MOST, active_clients)

    async def be_busy() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            autojump_clock.jump(0.001)
            active_clients.mark_active("quiet")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_busy)
        async with trio.open_nursery() as flood:
            for _ in range(10 * MOST):
                flood.start_soon(scheduler.wait_turn, "flood")
        nursery.cancel_scope.cancel()
    assert autojump_clock.current_time() < 10 * 2 * MAX_REST_SECONDS + 0.1


async def test_who_waits_for_an_answer_is_about_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    active_clients, others = ActiveClients(), ("flood",)
    with active_clients.serving("quiet"), active_clients.serving("flood"):
        with active_clients.serving("quiet"):
            await trio.sleep(RECENT_SECONDS)
        await trio.sleep(WAITING_SECONDS - RECENT_SECONDS - 0.1)
        assert active_clients.has_others(others)
        await trio.sleep(0.2)
        assert not active_clients.has_others(others)
    assert active_clients.has_others(others), "it may ask for more"
    await trio.sleep(RECENT_SECONDS + 0.1)
    assert not active_clients.has_others(others)


async def test_who_has_come_is_about_for_a_moment_but_not_for_the_line_that_let_it_in(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    active_clients = ActiveClients()
    active_clients.came("ann", " here")
    assert active_clients.has_others(())
    assert active_clients.has_others((" there", "bob"))
    assert not active_clients.has_others(("ann",))
    assert not active_clients.has_others((" here",))
    active_clients.came("ann", " there")
    assert not active_clients.has_others((" here",)), "by whichever line it came besides"
    active_clients.came("bob", " there")
    assert active_clients.has_others((" here",))
    await trio.sleep(RECENT_SECONDS + 0.1)
    assert not active_clients.has_others(())


async def test_who_asks_without_a_pause_keeps_a_rate_beside_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """One request after the other, each a millisecond of the loop."""
    active_clients = ActiveClients()
    scheduler = FairScheduler(MOST, active_clients, rate=100)

    async def seconds_of(requests: int, *, beside: str = "flood") -> float:
        began = autojump_clock.current_time()
        for _ in range(requests):
            active_clients.mark_active(beside)
            await scheduler.wait_turn("flood")
            autojump_clock.jump(0.001)
            await trio.lowlevel.checkpoint()
        return autojump_clock.current_time() - began

    burst = int(100 * BURST_SECONDS)
    assert await seconds_of(burst, beside="quiet") == pytest.approx(burst / 1000)
    assert await seconds_of(100, beside="quiet") == pytest.approx(1.0, rel=0.1)
    await trio.sleep(RECENT_SECONDS + 0.1)
    assert await seconds_of(500) == pytest.approx(0.5), "who is alone has all of the loop"


async def test_who_gives_up_waiting_owes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    active_clients = ActiveClients()
    scheduler = FairScheduler(MOST, active_clients, rate=100)
    active_clients.mark_active("quiet")
    for _ in range(int(100 * BURST_SECONDS)):
        await scheduler.wait_turn("flood")
        await trio.lowlevel.checkpoint()
    for _ in range(1000):
        with trio.CancelScope() as scope:
            scope.cancel()
            await scheduler.wait_turn("flood")
    began = autojump_clock.current_time()
    await scheduler.wait_turn("flood")
    assert autojump_clock.current_time() - began < 0.1


async def test_who_gives_up_in_the_line_owes_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its rate had let it pass, and the turn had no place left."""
    active_clients = ActiveClients()
    scheduler = FairScheduler(MOST, active_clients, rate=100)
    active_clients.mark_active("quiet")
    burst = int(100 * BURST_SECONDS)
    async with trio.open_nursery() as nursery:
        for _ in range(burst):
            nursery.start_soon(scheduler.wait_turn, "flood")
        await trio.testing.wait_all_tasks_blocked()
        assert scheduler._waiting, "the control: some stand in line"
        nursery.cancel_scope.cancel()
    began = autojump_clock.current_time()
    for _ in range(burst - MOST):
        await scheduler.wait_turn("flood")
    assert autojump_clock.current_time() - began < 0.1


async def test_floods_of_several_kinds_rest_together(
    autojump_clock: trio.testing.MockClock,
) -> None:
    active_clients = ActiveClients()
    schedulers = [FairScheduler(1, active_clients), FairScheduler(1, active_clients)]
    worked = 0.0
    active_clients.mark_active("quiet")

    async def request(scheduler: FairScheduler, steps: int) -> None:
        nonlocal worked
        await scheduler.wait_turn("flood")
        for _ in range(steps):
            autojump_clock.jump(0.0002)
            worked += 0.0002
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for scheduler, steps in zip(schedulers, (1, 5), strict=True):
            for _ in range(200):
                nursery.start_soon(request, scheduler, steps)
        await trio.sleep(0.2)
        assert worked == pytest.approx(0.2 / (1 + REST), rel=0.1)
        nursery.cancel_scope.cancel()


def burn() -> None:
    """Use twice as much of a processor as a name may at once."""
    until = time.thread_time() + 2 * LONG_WORK_BURST_SECONDS
    while time.thread_time() < until:
        pass


async def test_who_asks_for_one_spell_stands_behind_one_of_each_name(
    mock_clock: trio.testing.MockClock,
) -> None:
    assert mock_clock.rate == 0, "by it no account comes into credit again, however long it takes"
    thread_pool, order = FairThreadPool(ActiveClients()), list[str]()
    for name in ("flood", "other flood", "quiet"):
        await thread_pool.run(name, burn)

    async def work(name: str) -> None:
        await thread_pool.run(name, order.append, name)

    async with trio.open_nursery() as nursery:
        for name in ("flood", "other flood"):
            for _ in range(50):
                nursery.start_soon(work, name)
        await trio.lowlevel.checkpoint()
        nursery.start_soon(work, "quiet")
    assert len(order) == 101
    assert order.index("quiet") <= 4


async def test_who_has_worked_little_waits_neither_for_others_work_nor_for_their_rest(
    mock_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    active_clients, begun, end = ActiveClients(), threading.Event(), threading.Event()
    thread_pool = FairThreadPool(active_clients)
    await thread_pool.run("flood", burn)

    def work() -> None:
        begun.set()
        end.wait(2 * SOON)

    async def check_begins_at_once(name: str) -> None:
        done = threading.Event()
        nursery.start_soon(thread_pool.run, name, done.set)
        assert await trio.to_thread.run_sync(done.wait, SOON)

    nursery.start_soon(thread_pool.run, "flood", work)
    assert await trio.to_thread.run_sync(begun.wait, SOON)
    await check_begins_at_once("quiet")
    mock_clock.jump(1)
    active_clients.mark_active("quiet")
    begun.clear()
    nursery.start_soon(
        thread_pool.run, "flood", begun.set
    )  # after a rest, which only a jump can end
    end.set()
    await trio.testing.wait_all_tasks_blocked(0.01)
    await check_begins_at_once("quiet")
    assert not begun.is_set()
    mock_clock.jump(1 + REST)
    assert await trio.to_thread.run_sync(begun.wait, SOON)


async def test_one_name_has_one_spell_at_a_time() -> None:
    thread_pool, active, most = FairThreadPool(ActiveClients()), 0, 0

    def work() -> None:
        nonlocal active, most
        active += 1
        most = max(most, active)
        time.sleep(0.002)
        active -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(thread_pool.run, "name", work)
    assert most == 1


async def test_names_that_have_rested_are_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    assert autojump_clock is not None
    thread_pool = FairThreadPool(ActiveClients())
    for number in range(3):
        await thread_pool.run(f"name {number}", burn)
    assert len(thread_pool._accounts) == 3
    await trio.sleep(3 * LONG_WORK_BURST_SECONDS / LONG_WORK_SHARE)
    await thread_pool.run("quiet", int)
    assert list(thread_pool._accounts) == ["quiet"]
