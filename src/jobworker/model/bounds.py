"""Validators for numbers: what is out of bounds is told with the bounds."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(
    low: float, high: float, *, or_zero: bool = False
) -> Callable[[object, object, T], None]:
    """A validator for None and numbers from `low` to `high` (and 0, where that is "no limit")."""
    words = f"0 (no limit) or from {low} to {high}" if or_zero else f"from {low} to {high}"

    def check(_: object, __: object, value: T) -> None:
        if not isinstance(value, int | float) or low <= value <= high or (or_zero and value == 0):
            return
        raise ValueError(f"must be {words}, not {value}")

    return check
