"""Incidents: a background task outlives its faults, each of which is told and counted."""

import logging
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from jobworker.errors import Busy
from jobworker.incidents import LONGEST_PAUSE_SECONDS, Incidents


async def test_task_that_fails_is_told_counted_and_started_anew(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    incidents, begun = Incidents(), 0

    async def task() -> None:
        nonlocal begun
        begun += 1
        if begun < 4:
            async with trio.open_nursery():
                raise OSError(24, "Too many open files")
        await trio.sleep_forever()

    with caplog.at_level(logging.ERROR), trio.move_on_after(60) as scope:
        await incidents.keep_running("retention", task)
    assert scope.cancelled_caught
    assert begun == 4
    assert incidents.statistics() == {"retention": 3}
    assert len({record.getMessage() for record in caplog.records}) == 3, "a number for each"
    assert all("retention" in record.getMessage() for record in caplog.records)


async def test_task_that_fails_for_ever_is_tried_ever_more_seldom(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    incidents, times = Incidents(), []

    async def task() -> None:
        times.append(trio.current_time())
        raise ValueError("again")

    with trio.move_on_after(3600):
        await incidents.keep_running("audit", task)
    pauses = [after - before for before, after in pairwise(times)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_SECONDS
    assert len(times) < 80


async def test_cancellation_with_a_fault_at_the_same_time_ends_the_task(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    incidents = Incidents()

    async def task() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while it is cancelled")

    with trio.move_on_after(1) as scope:
        await incidents.keep_running("expiry", task)
    assert scope.cancelled_caught
    assert incidents.statistics() == {"expiry": 1}


async def test_foreseen_error_is_told_in_one_line(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    incidents = Incidents()

    async def task() -> None:
        async with trio.open_nursery():
            raise Busy("cannot look: no room", remedy="wait")

    with caplog.at_level(logging.ERROR), trio.move_on_after(0.1):
        await incidents.keep_running("retention", task)
    (record,) = caplog.records
    assert record.getMessage() == "retention: cannot look: no room; wait"
    assert record.exc_info is None
    assert incidents.statistics() == {"retention": 1}
