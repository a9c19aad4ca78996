"""How often measurements may begin, by what they use."""

import pytest

from jobworker.sandbox.kernel_memory.cpu_budget import (
    AT_ONCE_SECONDS,
    LONGEST_REST_SECONDS,
    SHARE,
    CpuBudget,
)


def test_what_uses_little_never_rests() -> None:
    pace = CpuBudget()
    for number in range(1000):
        pace.charge(number, 0.9 * SHARE)
        assert not pace.is_overdrawn(number)


def test_first_ones_may_follow_at_once() -> None:
    pace = CpuBudget()
    pace.charge(0, AT_ONCE_SECONDS / 2)
    pace.charge(0, AT_ONCE_SECONDS / 2)
    assert not pace.is_overdrawn(0)
    pace.charge(0, 0.01)
    assert pace.is_overdrawn(0)


@pytest.mark.parametrize("each", [0.001, 0.02, 0.09])
def test_what_goes_on_whenever_it_may_uses_its_share(each: float) -> None:
    pace, used, seconds = CpuBudget(), 0.0, 100
    for step in range(seconds * 1000):
        now = step / 1000
        if not pace.is_overdrawn(now):
            pace.charge(now, each)
            used += each
    assert used == pytest.approx(SHARE * seconds, rel=0.05)


def test_no_rest_is_longer_than_told() -> None:
    pace = CpuBudget()
    pace.charge(7, 1e9)
    assert pace.is_overdrawn(7 + 0.99 * LONGEST_REST_SECONDS)
    assert not pace.is_overdrawn(7 + 1.01 * LONGEST_REST_SECONDS)
