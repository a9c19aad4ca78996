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
    Callback,
    EventLoop,
)


def test_turn_takes_few_events_and_the_next_one_the_others() -> None:
    event_loop, seen, pipes = EventLoop(), [], [os.pipe() for _ in range(3 * EVENTS_A_TURN)]
    for read, write in pipes:
        event_loop.watch(read, lambda read=read: seen.append(os.read(read, 1)))  # type: ignore[misc]
        os.write(write, b"x")
    event_loop.run_once()
    assert len(seen) == EVENTS_A_TURN
    event_loop.run_once()
    event_loop.run_once()
    assert len(seen) == len(pipes)
    for read, write in pipes:
        event_loop.unwatch(read)
        os.close(read)
        os.close(write)


def wait_long() -> None:
    time.sleep(3 * SLOW_SECONDS)


def test_long_turn_is_counted_by_the_name_of_what_took_long(
    capfd: pytest.CaptureFixture[str],
) -> None:
    event_loop = EventLoop()
    event_loop.call_later(0, lambda: None)
    event_loop.call_later(0, wait_long)
    event_loop.run_once()
    times = event_loop.take_times()
    assert times.turns == 1
    assert times.over_bound == 1
    assert times.longest_ms >= 1000 * SLOW_SECONDS
    assert times.slowest == "wait_long"
    assert "most of it wait_long" in capfd.readouterr().err
    assert event_loop.take_times() == (0, 0.0, "", 0, 0)


def test_unexpected_exception_ends_its_call_alone_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(turns_module, "AGAIN_SECONDS", 0)
    event_loop, called = EventLoop(), list[str]()

    def fail_once() -> None:
        called.append("first")
        if len(called) == 1:
            raise KeyError("unforeseen")

    event_loop.call_later(0, fail_once)
    event_loop.call_later(0, lambda: called.append("second"))
    event_loop.run_once()
    assert called == ["first", "second"]
    event_loop.run_once()
    assert called == ["first", "second", "first"]
    assert event_loop.take_times().incidents == 1
    log = capfd.readouterr().err
    assert "fail_once" in log
    assert "KeyError: 'unforeseen'" in log


def test_call_that_is_seen_through_is_made_again_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(turns_module, "AGAIN_SECONDS", 0)
    event_loop, called = EventLoop(), list[str]()

    def fail_once() -> None:
        called.append("once")
        if called.count("once") == 1:
            raise KeyError("unforeseen")

    def fail() -> None:
        called.append("always")
        raise KeyError("unforeseen")

    event_loop.call_with_retries(fail_once)
    event_loop.call_with_retries(fail)
    assert called == ["once", "always"]
    for _ in range(2 * TRIES):
        event_loop.call_later(0, lambda: None)
        event_loop.run_once()
    assert (called.count("once"), called.count("always")) == (2, TRIES)
    assert event_loop.take_times().incidents == 1 + TRIES
    assert "fail is given up: it has failed 10 times" in capfd.readouterr().err


def test_call_that_is_seen_through_rests_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    event_loop, pauses = EventLoop(), list[float]()

    def keep(seconds: float, call: Callback) -> None:
        pauses.append(seconds)
        if len(pauses) < 4:
            call()

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(event_loop, "call_later", keep)
    event_loop.call_with_retries(fail)
    assert pauses == [AGAIN_SECONDS * each for each in (1, 2, 4, 8)]


def test_source_that_raises_each_time_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "AGAIN_SECONDS", 3600)
    event_loop, failed, heard = EventLoop(), [], []
    (bad, bad_end), (good, good_end) = os.pipe(), os.pipe()

    def fail() -> None:
        failed.append(event_loop)
        raise ZeroDivisionError

    event_loop.watch(bad, fail)
    event_loop.watch(good, lambda: heard.append(os.read(good, 1)))
    os.write(bad_end, b"x")
    for number in range(5):
        os.write(good_end, b"x")
        event_loop.run_once()
        assert len(heard) == number + 1
    assert len(failed) == 1
    assert event_loop.watches(bad)
    event_loop.watch_writable(bad, wanted=False)
    event_loop.call_later(0, event_loop._end_rests)
    event_loop.run_once()
    event_loop.run_once()
    assert len(failed) == 2, "it is tried again"

    event_loop.unwatch(bad)
    event_loop.watch(bad, lambda: heard.append(os.read(bad, 1)))
    event_loop.run_once()
    assert len(heard) == 6, "another one, by the same number, has nothing to do with it"
    for descriptor in (bad, good):
        event_loop.unwatch(descriptor)
    for descriptor in (bad, bad_end, good, good_end):
        os.close(descriptor)
