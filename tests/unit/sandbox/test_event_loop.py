"""The launcher's turns: bounded in events, timed, and told when one is too long."""

import os
import time

import pytest

from jobworker.sandbox import event_loop as turns_module
from jobworker.sandbox.event_loop import (
    AGAIN_SECONDS,
    EVENTS_A_TURN,
    SLOW_SECONDS,
    TRIES,
    Call,
    Turns,
)


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
    assert turns.take_times() == (0, 0.0, "", 0, 0)


def test_unexpected_exception_ends_its_call_alone_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(turns_module, "AGAIN_SECONDS", 0)
    turns, called = Turns(), list[str]()

    def fail_once() -> None:
        called.append("first")
        if len(called) == 1:
            raise KeyError("unforeseen")

    turns.call_in(0, fail_once)
    turns.call_in(0, lambda: called.append("second"))
    turns.turn()
    assert called == ["first", "second"]
    turns.turn()
    assert called == ["first", "second", "first"]
    assert turns.take_times().incidents == 1
    log = capfd.readouterr().err
    assert "fail_once" in log
    assert "KeyError: 'unforeseen'" in log


def test_call_that_is_seen_through_is_made_again_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(turns_module, "AGAIN_SECONDS", 0)
    turns, called = Turns(), list[str]()

    def fail_once() -> None:
        called.append("once")
        if called.count("once") == 1:
            raise KeyError("unforeseen")

    def fail() -> None:
        called.append("always")
        raise KeyError("unforeseen")

    turns.see_through(fail_once)
    turns.see_through(fail)
    assert called == ["once", "always"]
    for _ in range(2 * TRIES):
        turns.call_in(0, lambda: None)
        turns.turn()
    assert (called.count("once"), called.count("always")) == (2, TRIES)
    assert turns.take_times().incidents == 1 + TRIES
    assert "fail is given up: it has failed 10 times" in capfd.readouterr().err


def test_call_that_is_seen_through_rests_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, pauses = Turns(), list[float]()

    def keep(seconds: float, call: Call) -> None:
        pauses.append(seconds)
        if len(pauses) < 4:
            call()

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(turns, "call_in", keep)
    turns.see_through(fail)
    assert pauses == [AGAIN_SECONDS * each for each in (1, 2, 4, 8)]


def test_source_that_raises_each_time_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "AGAIN_SECONDS", 3600)
    turns, failed, heard = Turns(), [], []
    (bad, bad_end), (good, good_end) = os.pipe(), os.pipe()

    def fail() -> None:
        failed.append(turns)
        raise ZeroDivisionError

    turns.watch(bad, fail)
    turns.watch(good, lambda: heard.append(os.read(good, 1)))
    os.write(bad_end, b"x")
    for number in range(5):
        os.write(good_end, b"x")
        turns.turn()
        assert len(heard) == number + 1
    assert len(failed) == 1
    assert turns.watches(bad)
    turns.watch_room(bad, wanted=False)
    turns.call_in(0, turns._end_rests)
    turns.turn()
    turns.turn()
    assert len(failed) == 2, "it is tried again"

    turns.unwatch(bad)
    turns.watch(bad, lambda: heard.append(os.read(bad, 1)))
    turns.turn()
    assert len(heard) == 6, "another one, by the same number, has nothing to do with it"
    for descriptor in (bad, good):
        turns.unwatch(descriptor)
    for descriptor in (bad, bad_end, good, good_end):
        os.close(descriptor)
