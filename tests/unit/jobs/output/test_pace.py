"""Streams of many jobs share a part of a processor; few streams and silent ones do not wait."""

import pytest
import trio
import trio.testing

from jobworker.jobs.output.pace import (
    BURST_SECONDS,
    BUSY_SECONDS,
    FEW,
    LOOP_SECONDS,
    MAX_REST_SECONDS,
    SHARE,
    OutputPace,
)

COST = 0.001
MANY = 20 * FEW
TINY = 1e-6
"""What part of its pipe a stream fills that writes a byte at a time."""


async def rest(
    pace: OutputPace, stream: object, cost: float = COST, *, owner: str = "", filled: float = TINY
) -> float:
    """Rest after a move: for how long."""
    seconds = pace.rest_after(trio.current_time(), owner, stream, cost, filled)
    await trio.sleep(seconds)
    return seconds


async def move_often(
    pace: OutputPace, stream: object, times: int, owner: str = "", filled: float = TINY
) -> None:
    for _ in range(times):
        await trio.sleep(COST)
        await rest(pace, stream, owner=owner, filled=filled)


@pytest.mark.parametrize(("streams", "is_bounded"), [(FEW, False), (MANY, True)])
@pytest.mark.parametrize("filled", [TINY, 1.0])
@pytest.mark.parametrize("owners", [1, 4])
async def test_only_many_streams_share_a_part_of_a_processor(
    streams: int,
    is_bounded: bool,
    filled: float,
    owners: int,
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace, times = OutputPace(), 50
    async with trio.open_nursery() as nursery:
        for stream in range(streams):
            nursery.start_soon(move_often, pace, stream, times, f"{stream % owners}", filled)
    taken = autojump_clock.current_time()
    if is_bounded:
        # What is there at once: a burst of each, and until what the others take is known.
        assert taken >= (streams * (times - 2) * COST - 2 * owners * BURST_SECONDS) / SHARE
    else:
        assert taken == pytest.approx(times * COST)


async def moves_beside_many(pace: OutputPace, owner: str, filled: float) -> int:
    """How often a stream of `owner` is moved in ten seconds, beside many tiny ones of alice's."""
    moves = 0
    async with trio.open_nursery() as nursery:
        for stream in range(MANY):
            nursery.start_soon(move_often, pace, stream, 10**6, "alice")
        await trio.sleep(BUSY_SECONDS)
        with trio.move_on_after(10):
            while True:
                await trio.sleep(COST)
                await rest(pace, "one", owner=owner, filled=filled)
                moves += 1
        nursery.cancel_scope.cancel()
    return moves


@pytest.mark.parametrize(
    ("owner", "filled"), [("alice", 1.0), ("bob", 1.0), ("bob", TINY)], ids=repr
)
async def test_who_writes_a_byte_at_a_time_slows_down_neither_much_nor_other_owners(
    owner: str, filled: float, autojump_clock: trio.testing.MockClock
) -> None:
    moves = await moves_beside_many(OutputPace(), owner, filled)
    assert moves >= 0.9 * 10 * SHARE / 2 / (COST + LOOP_SECONDS), "half of what there is"
    assert await moves_beside_many(OutputPace(), "alice", TINY) < moves / 5, "the control"


async def test_what_others_do_not_take_is_there_for_who_writes_much(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace, moves = OutputPace(), 0

    async def write_seldom(owner: str) -> None:
        while True:
            await trio.sleep(1)
            await rest(pace, owner, owner=owner)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(write_seldom, f"{number}")
        await trio.sleep(BUSY_SECONDS)
        with trio.move_on_after(10):
            while True:
                await trio.sleep(COST)
                await rest(pace, "much", owner="alice", filled=1.0)
                moves += 1
        nursery.cancel_scope.cancel()
    assert moves >= 0.7 * 10 * SHARE / (COST + LOOP_SECONDS)


async def test_stream_that_would_fill_its_pipe_rests_until_it_is_half_full(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Since a move of much costs hardly more than one of little."""
    pace = OutputPace()
    for other in range(MANY):
        await rest(pace, other, owner="bob")
    assert await rest(pace, "fast", owner="alice", filled=0.05) == 0
    while not await rest(pace, "much", owner="alice", filled=1.0):
        pass
    pace.rest_after(trio.current_time(), "alice", "much", BURST_SECONDS / 5, 1.0)
    pace.rest_after(trio.current_time(), "alice", "fast", COST, 0.05)
    await trio.sleep(0.05)
    assert await rest(pace, "fast", owner="alice", filled=0.05) == pytest.approx(0.5)


async def test_stream_that_was_silent_does_not_rest(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = OutputPace()
    async with trio.open_nursery() as nursery:
        for stream in range(MANY):
            nursery.start_soon(move_often, pace, stream, 50)
        await trio.sleep(BUSY_SECONDS / 2)
        for newcomer in ("one", "another"):
            assert await rest(pace, newcomer) == 0
        assert await rest(pace, "one") > 0, "the control: it was moved a moment ago"
        nursery.cancel_scope.cancel()


async def test_debt_of_many_that_write_seldom_is_bounded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = OutputPace()
    for stream in range(50_000):
        await rest(pace, stream)
    await rest(pace, "busy")
    assert 0 < await rest(pace, "busy") <= MAX_REST_SECONDS


async def test_streams_that_have_fallen_silent_are_forgotten(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = OutputPace()
    for stream in range(MANY):
        await rest(pace, stream, owner=f"{stream}")
    assert pace.is_crowded
    await trio.sleep(2 * BUSY_SECONDS)
    await rest(pace, "alone", 1000.0)
    assert not pace.is_crowded
    assert await rest(pace, "alone") == 0
    for stream in range(MANY):
        await rest(pace, stream, owner="one")
    assert len(pace._accounts) == 1
