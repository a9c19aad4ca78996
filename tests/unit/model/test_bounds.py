"""Bounds on numbers: what lies within passes, all else is told with the bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.model.bounds import at_most, within

from ..strategies import examples


@examples(max_examples=200)
@given(st.integers() | st.floats(), st.booleans())
def test_number_passes_if_and_only_if_it_is_within(number: float, or_zero: bool) -> None:
    check = within(5, 10, or_zero=or_zero)
    if 5 <= number <= 10 or (or_zero and number == 0):
        check(None, None, number)
        return
    with pytest.raises(ValueError, match="from 5 to 10"):
        check(None, None, number)


def test_bounds_themselves_are_within() -> None:
    check = within(5, 10)
    for number in (5, 10, 5.0, 10.0):
        check(None, None, number)
    for outside in (4, 11, 0, 4.999, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be from 5 to 10, not"):
            check(None, None, outside)


def test_nothing_given_is_within() -> None:
    within(5, 10)(None, None, None)


def test_message_says_that_zero_is_no_limit() -> None:
    with pytest.raises(ValueError, match=r"must be 0 \(no limit\) or from 5 to 10, not 3"):
        within(5, 10, or_zero=True)(None, None, 3)


def test_collection_passes_up_to_its_bound() -> None:
    at_most(2)(None, None, ("a", "b"))
    with pytest.raises(ValueError, match="must have at most 2 entries, not 3"):
        at_most(2)(None, None, ("a", "b", "c"))
