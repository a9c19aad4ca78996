"""Of one name a few messages are let in at a time; others pass by."""

import trio

from jobworker.server.turnstile import AT_A_TIME, Turnstile


async def test_many_of_one_name_leave_each_turn_to_others() -> None:
    turnstile, order = Turnstile(), list[str]()

    async def enter(name: str) -> None:
        await turnstile.enter(name)
        order.append(name)

    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(enter, "flood")
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        nursery.start_soon(enter, "quiet")
    assert order.count("flood") == 200
    assert order.index("quiet") <= 5 * AT_A_TIME


async def test_who_comes_alone_does_not_wait() -> None:
    turnstile = Turnstile()
    for _ in range(3):
        with trio.CancelScope() as scope:
            scope.cancel()
            await turnstile.enter("one")  # has no checkpoint
        assert not scope.cancelled_caught


async def test_who_is_cancelled_holds_up_nobody() -> None:
    turnstile, entered = Turnstile(), list[int]()

    async def enter(number: int) -> None:
        await turnstile.enter("name")
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
