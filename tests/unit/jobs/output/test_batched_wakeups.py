"""What wakes many tasks leaves turns to others."""

import pytest
import trio

from jobworker.jobs.output.batched_wakeups import (
    AT_A_TIME,
    BatchedEvent,
    cancel_in_batches,
    run_in_batches,
)


async def test_waiters_are_woken_a_few_in_each_turn() -> None:
    event, turns = BatchedEvent(), list[int]()
    woken = 0

    async def wait() -> None:
        nonlocal woken
        await event.wait()
        woken += 1

    async def count() -> None:
        """What another task sees, in each of its turns."""
        while woken < 1000:
            before = woken
            await trio.lowlevel.checkpoint()
            turns.append(woken - before)

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not event.is_set()
        event.set()
        event.set()
        nursery.start_soon(count)
    assert woken == 1000
    assert max(turns) <= 2 * AT_A_TIME
    with trio.fail_after(1):
        await event.wait()


async def test_waiter_that_is_cancelled_holds_up_nobody() -> None:
    event, woken = BatchedEvent(), list[int]()

    async def wait(number: int) -> None:
        await event.wait()
        woken.append(number)

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as others:
                for number in range(100):
                    others.start_soon(wait, number)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        for number in range(100, 200):
            nursery.start_soon(wait, number)
        await trio.testing.wait_all_tasks_blocked()
        event.set()
    assert sorted(woken) == list(range(100, 200))


async def test_fault_ends_neither_the_loop_nor_the_work(caplog: pytest.LogCaptureFixture) -> None:
    left, done = list(range(10)), list[int]()

    def some() -> bool:
        number = left.pop(0)
        if number == 3:
            raise ValueError("unexpected")
        done.append(number)
        return bool(left)

    trio.lowlevel.current_trio_token().run_sync_soon(run_in_batches, some)
    with trio.fail_after(5):
        while left:
            await trio.lowlevel.checkpoint()
    assert done == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert "unexpected" in caplog.text


async def test_scopes_are_cancelled_a_few_in_each_turn_and_all_of_them() -> None:
    scopes, turns, ended = set[trio.CancelScope](), list[int](), 0

    async def wait() -> None:
        nonlocal ended
        with trio.CancelScope() as scope:
            scopes.add(scope)
            await trio.sleep_forever()
        ended += 1

    async def count() -> None:
        while ended < 200:
            before = ended
            await trio.lowlevel.checkpoint()
            turns.append(ended - before)

    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(count)
        with trio.CancelScope() as impatient:
            impatient.cancel()
            await cancel_in_batches(scopes)
    assert ended == 200
    assert not scopes
    assert max(turns) <= 2 * AT_A_TIME
