"""Validators for durations of the configuration, which are text such as "90s" or "1h30m"."""

from jobworker.model.units import parse_duration


def check_duration(_: object, __: object, value: str) -> None:
    """A validator of attrs: raises ValueError for text that is not a duration."""
    parse_duration(value)


def check_positive_duration(_: object, __: object, value: str) -> None:
    """A validator of attrs: raises ValueError for text that is not a duration longer than 0."""
    if not parse_duration(value):
        raise ValueError("must be longer than 0")
