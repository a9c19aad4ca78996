"""Of one name a few pass at a time; others pass by."""

from collections import Counter

import trio

from jobworker.server.turnstile import Presence, Turnstile

MOST = 4


async def test_many_of_one_name_leave_each_turn_to_others() -> None:
    turnstile, order = Turnstile(MOST, Presence()), list[str]()

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
    assert order.index("quiet") <= 5 * MOST


class Turns(trio.abc.Instrument):
    """Counts the turns of the event loop: it looks for I/O once in each."""

    now = 0

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - as trio calls it
        """See trio.abc.Instrument."""
        self.now += 1


async def test_what_passes_in_a_turn_is_bounded_by_its_cost_and_shared_by_the_names() -> None:
    turnstile, turns, passed = Turnstile(64, Presence()), Turns(), Counter[tuple[int, str]]()

    async def enter(name: str, cost: int) -> None:
        await turnstile.enter(name, cost)
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


async def test_one_that_costs_more_than_all_may_passes_alone() -> None:
    turnstile = Turnstile(MOST, Presence())
    for _ in range(10):
        await turnstile.enter("name", 100 * MOST)


async def test_who_comes_alone_does_not_wait() -> None:
    turnstile = Turnstile(MOST, Presence())
    for _ in range(3):
        with trio.CancelScope() as scope:
            scope.cancel()
            await turnstile.enter("one")  # has no checkpoint
        assert not scope.cancelled_caught


async def test_who_is_cancelled_holds_up_nobody() -> None:
    turnstile, entered = Turnstile(MOST, Presence()), list[int]()

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
