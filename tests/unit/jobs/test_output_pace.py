"""Streams of many jobs share a part of a processor; few streams and silent ones do not wait."""

import pytest
import trio
import trio.testing

from jobworker.jobs.output_pace import (
    BURST_SECONDS,
    BUSY_SECONDS,
    FEW,
    MAX_REST_SECONDS,
    SHARE,
    OutputPace,
)

COST = 0.001
MANY = 20 * FEW


async def move_often(pace: OutputPace, stream: object, times: int) -> None:
    for _ in range(times):
        await trio.sleep(COST)
        await pace.rest(stream, COST)


@pytest.mark.parametrize(("streams", "is_bounded"), [(FEW, False), (MANY, True)])
async def test_only_many_streams_share_a_part_of_a_processor(
    streams: int, is_bounded: bool, autojump_clock: trio.testing.MockClock
) -> None:
    pace, times = OutputPace(), 50
    async with trio.open_nursery() as nursery:
        for stream in range(streams):
            nursery.start_soon(move_often, pace, stream, times)
    taken = autojump_clock.current_time()
    if is_bounded:
        assert taken >= (streams * (times - 2) * COST - BURST_SECONDS) / SHARE
    else:
        assert taken == pytest.approx(times * COST)


async def test_stream_that_was_silent_does_not_rest(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = OutputPace()
    async with trio.open_nursery() as nursery:
        for stream in range(MANY):
            nursery.start_soon(move_often, pace, stream, 50)
        await trio.sleep(BUSY_SECONDS / 2)
        for newcomer in ("one", "another"):
            began = autojump_clock.current_time()
            await pace.rest(newcomer, COST)
            assert autojump_clock.current_time() == began
        await pace.rest("one", COST)
        assert autojump_clock.current_time() > began, "the control: it was moved a moment ago"
        nursery.cancel_scope.cancel()


async def test_debt_of_many_that_write_seldom_is_bounded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = OutputPace()
    for stream in range(50_000):
        await pace.rest(stream, COST)
    await pace.rest("busy", COST)
    began = autojump_clock.current_time()
    await pace.rest("busy", COST)
    assert 0 < autojump_clock.current_time() - began <= MAX_REST_SECONDS


async def test_streams_that_have_fallen_silent_are_forgotten(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = OutputPace()
    for stream in range(MANY):
        await pace.rest(stream, COST)
    assert pace.is_crowded
    await trio.sleep(2 * BUSY_SECONDS)
    await pace.rest("alone", 1000.0)
    assert not pace.is_crowded
    began = autojump_clock.current_time()
    await pace.rest("alone", COST)
    assert autojump_clock.current_time() == began
