"""The converter's hooks, one for each type: accept a plain value exactly, without conversion.

Each returns the value, or raises TypeError or ValueError, whose message says what it must be.
"""

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import Enum
from typing import Any, get_args

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def kind(value: object) -> str:
    """Name the JSON type of a plain value in words, such as "a list"."""
    return _KINDS.get(type(value), type(value).__name__)


def integer(value: object, _: object) -> int:
    """Accept an integer, but no boolean."""
    if type(value) is not int:
        raise TypeError(f"must be an integer, not {kind(value)}")
    return value


def number(value: object, _: object) -> float:
    """Accept a finite number."""
    if type(value) not in (int, float):
        raise TypeError(f"must be a number, not {kind(value)}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


def boolean(value: object, _: object) -> bool:
    """Accept a boolean."""
    if type(value) is not bool:
        raise TypeError(f"must be true or false, not {kind(value)}")
    return value


def string(value: object, _: object) -> str:
    """Accept a string of Unicode scalar values: no lone surrogates, which UTF-8 cannot encode."""
    if type(value) is not str:
        raise TypeError(f"must be a string, not {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("must be Unicode text: it holds a lone surrogate") from None
    return value


def are_strings(*values: Iterable[object]) -> bool:
    """Whether `string` accepts every entry of `values`; much faster than one call for each."""
    for each in values:
        if not set(map(type, each)) <= {str}:
            return False
        try:
            "".join(each).encode("utf-8")  # type: ignore[arg-type]
        except UnicodeEncodeError:
            return False
    return True


def member(value: object, cls: type[Enum]) -> Enum:
    """Accept the value of a member of an enumeration, and return the member."""
    try:
        return cls(string(value, str))
    except ValueError:
        known = ", ".join(str(member.value) for member in cls)
        raise ValueError(f"must be one of {known}") from None


def moment(value: object, _: object) -> datetime:
    """Accept an ISO 8601 date and time with a time zone, and return it in UTC."""
    text = string(value, str)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("must be a date and time, such as 2026-01-31T12:00:00Z") from None
    if found.tzinfo is None:
        raise ValueError("must carry a time zone, such as 2026-01-31T12:00:00Z")
    try:
        return found.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie between the years 1 and 9999 in UTC") from None


def literal(value: object, cls: Any) -> object:
    """Accept one of the values of a `typing.Literal`."""
    for allowed in get_args(cls):
        if type(value) is type(allowed) and value == allowed:
            return value
    raise ValueError("must be one of " + ", ".join(str(allowed) for allowed in get_args(cls)))
