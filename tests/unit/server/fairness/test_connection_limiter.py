"""Who comes in: by number, by certificate and by what an address did before."""

import logging
from contextlib import ExitStack, suppress

import pytest
import trio
import trio.testing

from jobworker.config.limits import ConnectionLimits
from jobworker.errors import TooManyConnections, TooManyFailures
from jobworker.server.fairness import connection_limiter as module
from jobworker.server.fairness.connection_limiter import (
    SLOWED_PART,
    ConnectionLimiter,
    ConnectionStatistics,
    network_of,
)
from jobworker.server.fairness.handshake_lottery import TURN_SECONDS
from jobworker.server.reporting.counters import CONNECTIONS, HANDSHAKES_FAILED, LIMITS_REACHED


def small(**limits: object) -> ConnectionLimiter:
    return ConnectionLimiter(
        ConnectionLimits(
            **{  # type: ignore[arg-type]
                "max_connections": 3,
                "max_connections_per_certificate": 2,
                "max_handshakes": 2,
                "handshake_timeout": "10s",
                "max_failed_handshakes": 3,
                **limits,
            }
        )
    )


def fail(limiter: ConnectionLimiter, address: str) -> None:
    with limiter.track_pending("peer", address) as pending:
        pending.heard = True


async def test_arrival_that_takes_too_long_is_cancelled_and_told(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = small()
    began = trio.current_time()
    with caplog.at_level(logging.INFO), limiter.track_pending("10.0.0.1:5", "10.0.0.1"):
        await trio.sleep_forever()
    assert trio.current_time() - began == pytest.approx(10)
    assert limiter.counters.value(LIMITS_REACHED, "handshake_too_slow") == 1
    assert limiter.counters.value(HANDSHAKES_FAILED) == 0  # it had not said a byte
    assert "10.0.0.1:5: handshake_too_slow: cannot wait for the handshake" in caplog.text


async def test_arrival_that_is_open_has_all_its_time(autojump_clock: object) -> None:
    limiter = small()
    with limiter.track_pending("peer", "10.0.0.1") as pending:
        assert limiter.statistics() == ConnectionStatistics(arriving=1, inside=0)
        pending.finish()
        assert limiter.statistics() == ConnectionStatistics(arriving=0, inside=0)
        await trio.sleep(1000)
    assert limiter.counters.statistics() == {}


async def test_oldest_arrival_makes_room(autojump_clock: object) -> None:
    limiter = small()
    ended = list[tuple[str, float]]()

    async def arrive(name: str) -> None:
        with limiter.track_pending(name, "10.0.0.1"):
            await trio.sleep_forever()
        ended.append((name, trio.current_time() - began))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for name in ("first", "second", "third"):
            nursery.start_soon(arrive, name)
            await trio.sleep(1)
    assert ended == [("first", 2), ("second", 11), ("third", 12)]
    assert limiter.counters.value(LIMITS_REACHED, "too_many_handshakes") == 1


async def test_failures_of_an_address_slow_it_down_and_nobody_else(autojump_clock: object) -> None:
    limiter = small(max_handshakes=10)
    began = trio.current_time()

    async def arrive(address: str) -> float:
        with limiter.track_pending("peer", address) as pending:
            await limiter.wait_turn(pending)
            pending.finish()
        return trio.current_time() - began

    for _ in range(3):
        assert await arrive("10.0.0.1") == 0
        fail(limiter, "10.0.0.1")
    took = [await arrive("10.0.0.1") for _ in range(5)]
    assert took == pytest.approx([number * TURN_SECONDS for number in range(5)])
    assert await arrive("10.0.0.2") == took[-1]
    await trio.sleep(61)
    began = trio.current_time()
    assert [await arrive("10.0.0.1") for _ in range(5)] == [0] * 5


async def test_closing_without_a_byte_is_no_failure() -> None:
    limiter = small()
    for _ in range(1000):
        with limiter.track_pending("peer", "10.0.0.1"):
            pass
    assert limiter.counters.value(HANDSHAKES_FAILED) == 0


async def test_who_says_nothing_makes_room_before_who_waits_for_a_turn() -> None:
    limiter = small()
    for _ in range(3):
        fail(limiter, "10.0.0.1")
    with ExitStack() as stack:
        first = stack.enter_context(limiter.track_pending("first", "10.0.0.1"))
        first.heard = True
        silent = stack.enter_context(limiter.track_pending("silent", "10.0.0.2"))
        third = stack.enter_context(limiter.track_pending("third", "10.0.0.2"))
        assert (first.was_dropped, silent.was_dropped) == (False, True)
        third.heard = True
        with pytest.raises(TooManyFailures, match=r"10\.0\.0\.1"):
            fail(limiter, "10.0.0.1")
        stack.enter_context(
            limiter.track_pending("other", "10.0.0.3")
        )  # a good address has the place
        assert (first.was_dropped, third.was_dropped) == (True, False)


async def test_who_stalls_after_its_turn_makes_room_also_for_its_own_address(
    autojump_clock: object,
) -> None:
    """One byte on each of all connections keeps nobody of that address out."""
    limiter = small(max_handshakes=2 * SLOWED_PART)
    for _ in range(3):
        fail(limiter, "10.0.0.1")
    with ExitStack() as stack:
        for name in ("first", "second"):
            stalled = stack.enter_context(limiter.track_pending(name, "10.0.0.1"))
            await limiter.wait_turn(stalled)
            stalled.start_turn()
        with pytest.raises(TooManyFailures):
            fail(limiter, "10.0.0.1")
        await trio.sleep(1)
        began = trio.current_time()
        with limiter.track_pending("honest", "10.0.0.1") as honest:
            await limiter.wait_turn(honest)
            honest.finish()
        assert trio.current_time() - began < 0.1


async def test_who_is_slowed_down_takes_no_place_of_one_that_has_just_come(
    autojump_clock: object,
) -> None:
    limiter = small()
    for _ in range(3):
        fail(limiter, "10.0.0.1")
    with ExitStack() as stack:
        for name in ("honest", "silent"):
            stack.enter_context(limiter.track_pending(name, "10.0.0.2"))
        with pytest.raises(TooManyFailures):
            fail(limiter, "10.0.0.1")
        assert limiter.statistics().arriving == 2
        await trio.sleep(1)
        stack.enter_context(limiter.track_pending("slowed", "10.0.0.1"))
        assert limiter.counters.value(LIMITS_REACHED, "too_many_failures") == 0
        assert limiter.statistics().arriving == 2, "a silent one has left"


async def test_flood_that_is_not_slowed_down_yet_takes_no_place_of_others(
    autojump_clock: object,
) -> None:
    limiter = small(max_handshakes=3)
    with ExitStack() as stack:
        honest = stack.enter_context(limiter.track_pending("honest", "10.0.0.2"))
        await limiter.wait_turn(honest)
        for number in range(100):
            flood = stack.enter_context(limiter.track_pending(str(number), "10.0.0.1"))
            await limiter.wait_turn(flood)
        assert not honest.was_dropped
        quiet = stack.enter_context(limiter.track_pending("has said nothing yet", "10.0.0.3"))
        stack.enter_context(limiter.track_pending("one more", "10.0.0.1"))
        assert not quiet.was_dropped
        assert limiter.statistics().arriving == 3


async def test_who_has_shown_a_certificate_leaves_for_nobody_else(autojump_clock: object) -> None:
    limiter = small(max_handshakes=3)
    with ExitStack() as stack:
        honest = stack.enter_context(limiter.track_pending("honest", "10.0.0.1"))
        await limiter.wait_turn(honest)
        honest.start_turn()
        honest.mark_authenticated()
        await trio.sleep(1)  # it waits for the service
        for number in range(10):
            stack.enter_context(limiter.track_pending(str(number), "10.0.0.1"))
        assert not honest.was_dropped


async def test_who_stalls_after_its_certificate_leaves_before_an_honest_one(
    autojump_clock: object,
) -> None:
    limiter = small(max_handshakes=3)
    with ExitStack() as stack:
        stalled = [stack.enter_context(limiter.track_pending(name, "10.0.0.1")) for name in "abc"]
        for each in stalled:
            each.heard = True
            each.mark_authenticated()
            each.start_turn()
        await trio.sleep(1)
        honest = stack.enter_context(limiter.track_pending("honest", "10.0.0.1"))
        await limiter.wait_turn(honest)
        honest.start_turn()
        stack.enter_context(limiter.track_pending("newcomer", "10.0.0.1"))
        assert not honest.was_dropped
        assert [each.was_dropped for each in stalled] == [True, True, False]


async def test_slowed_network_with_all_its_places_takes_none_of_others(
    autojump_clock: object,
) -> None:
    limiter = small(max_handshakes=4 * SLOWED_PART)
    for _ in range(3):
        fail(limiter, "10.0.0.1")
    with ExitStack() as stack:
        office = [stack.enter_context(limiter.track_pending(str(n), "10.0.0.2")) for n in range(6)]
        flood = [stack.enter_context(limiter.track_pending(str(n), "10.0.0.1")) for n in range(4)]
        for each in (*office, *flood):
            each.heard = True
            each.start_turn()
        with pytest.raises(TooManyFailures):
            fail(limiter, "10.0.0.1")
        await trio.sleep(1)  # the office is slow
        for number in range(20):
            newcomer = stack.enter_context(limiter.track_pending(str(number), "10.0.0.1"))
            newcomer.start_turn()
            await trio.sleep(1)
        assert not any(each.was_dropped for each in office)
        assert all(each.was_dropped for each in flood)


async def test_full_service_lets_none_go_of_a_slowed_network_that_is_sound() -> None:
    limiter = small(max_handshakes=4)
    with ExitStack() as stack:
        known, other = (stack.enter_context(limiter.track_pending(n, "10.0.0.1")) for n in "ab")
        known.heard = other.heard = True
        known.mark_authenticated()
        for _ in range(3):
            fail(limiter, "10.0.0.1")
        for number in range(2, 5):
            each = stack.enter_context(limiter.track_pending(str(number), f"10.0.0.{number}"))
            each.heard = True
        assert (known.was_dropped, other.was_dropped) == (False, True)


async def test_newcomer_of_a_slowed_network_leaves_where_there_is_no_place(
    autojump_clock: object,
) -> None:
    limiter = small(max_handshakes=3 * SLOWED_PART)
    for _ in range(3):
        fail(limiter, "10.0.0.1")
    let_in = list[str]()

    async def arrive(name: str) -> None:
        with suppress(TooManyFailures), limiter.track_pending(name, "10.0.0.1") as pending:
            await limiter.wait_turn(pending)
            let_in.append(name)
            pending.finish()

    with limiter.track_pending("turn taken", "10.0.0.1") as first:
        await limiter.wait_turn(first)
        async with trio.open_nursery() as nursery:
            for name in ("waiting", "other"):
                assert limiter.refusal("10.0.0.1") is None
                nursery.start_soon(arrive, name)
                await trio.testing.wait_all_tasks_blocked()
            assert limiter.refusal("10.0.0.1") is not None
            assert limiter.refusal("10.0.0.2") is None
            nursery.start_soon(arrive, "newcomer")
    assert set(let_in) == {"waiting", "other"}


async def test_failures_may_be_unlimited() -> None:
    limiter = small(max_failed_handshakes=0)
    for _ in range(1000):
        fail(limiter, "10.0.0.1")


async def test_memory_of_failures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ADDRESSES", 5)
    limiter = small()
    for number in range(100):
        fail(limiter, f"10.0.0.{number}")
    assert len(limiter._failures) == 5


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2", True),
        ("a client that is gone", "another", False),
    ],
)
def test_addresses_are_counted_by_who_can_choose_them(one: str, other: str, same: bool) -> None:
    assert (network_of(one) == network_of(other)) is same


def test_users_of_this_host_are_counted_by_name_whatever_their_address() -> None:
    assert network_of("127.0.0.1") == network_of("127.3.2.1") == network_of("::ffff:127.0.0.9")
    assert network_of("127.0.0.1", "uid 7") == network_of("10.0.0.1", "uid 7")
    assert network_of("127.0.0.1", "uid 7") != network_of("127.0.0.1", "uid 8")
    assert network_of("127.0.0.1", "uid 7") != network_of("127.0.0.1")


def test_connections_are_bounded_in_all_and_by_name() -> None:
    limiter = small()
    with ExitStack() as stack:
        stack.enter_context(limiter.track_open("A"))
        stack.enter_context(limiter.track_open("A"))
        with pytest.raises(TooManyConnections, match="2 are open with certificates of this name"):
            stack.enter_context(limiter.track_open("A"))
        stack.enter_context(limiter.track_open("B"))
        with pytest.raises(TooManyConnections, match="as many as this service takes"):
            stack.enter_context(limiter.track_open("C"))
        assert limiter.statistics().inside == 3
    assert limiter.statistics().inside == 0
    assert limiter.counters.value(CONNECTIONS) == 3


def test_last_places_are_for_names_that_have_few() -> None:
    limiter = small(max_connections=200, max_connections_per_certificate=100)
    with ExitStack() as stack:
        for name in [*["A"] * 100, *["B"] * 80]:
            stack.enter_context(limiter.track_open(name))
        with pytest.raises(TooManyConnections, match="180 of 200 are open, and the rest is for"):
            stack.enter_context(limiter.track_open("B"))
        for number in range(20):
            stack.enter_context(limiter.track_open(f"admin {number // 2}"))
        with pytest.raises(TooManyConnections, match="as many as this service takes"):
            stack.enter_context(limiter.track_open("C"))


async def test_flood_of_refusals_is_no_flood_of_lines(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = small()
    error = TooManyConnections("cannot serve the connection: full")
    with caplog.at_level(logging.INFO):
        for _ in range(1000):
            limiter.record_limit("peer", error)
        await trio.sleep(2)
        limiter.record_limit("peer", error)
    assert [record.getMessage() for record in caplog.records] == [
        "peer: too_many_connections: cannot serve the connection: full",
        "peer: too_many_connections: cannot serve the connection: full (and 999 more before)",
    ]
    assert limiter.counters.value(LIMITS_REACHED, "too_many_connections") == 1001
