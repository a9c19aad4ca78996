"""The launcher's turns: bounded in events, timed, and told when one is too long."""

import os
import time

import pytest

from jobworker.sandbox.turns import EVENTS_A_TURN, SLOW_SECONDS, Turns


def test_turn_takes_few_events_and_the_next_one_the_others() -> None:
    turns, seen, pipes = Turns(), [], [os.pipe() for _ in range(3 * EVENTS_A_TURN)]
    for read, write in pipes:
        turns.watch(read, lambda read=read: seen.append(os.read(read, 1)))  # type: ignore[misc]
        os.write(write, b"x")
    turns.turn()
    assert len(seen) == EVENTS_A_TURN
    turns.turn()
    turns.turn()
    assert len(seen) == len(pipes)
    for read, write in pipes:
        turns.unwatch(read)
        os.close(read)
        os.close(write)


def wait_long() -> None:
    time.sleep(3 * SLOW_SECONDS)


def test_long_turn_is_counted_by_the_name_of_what_took_long(
    capfd: pytest.CaptureFixture[str],
) -> None:
    turns = Turns()
    turns.call_in(0, lambda: None)
    turns.call_in(0, wait_long)
    turns.turn()
    times = turns.take_times()
    assert times.turns == 1
    assert times.over_bound == 1
    assert times.longest_ms >= 1000 * SLOW_SECONDS
    assert times.slowest == "wait_long"
    assert "most of it wait_long" in capfd.readouterr().err
    assert turns.take_times() == (0, 0.0, "", 0)
