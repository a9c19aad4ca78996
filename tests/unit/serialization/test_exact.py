"""The converter's hooks: each accepts its own type exactly, and says what a value must be."""

import enum
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

import pytest

from jobworker.serialization.exact import (
    are_strings,
    boolean,
    integer,
    kind,
    literal,
    member,
    moment,
    number,
    string,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Text(str):
    """A string that may do anything."""


class Count(int):
    """An integer that may do anything."""


SURROGATE = "\ud800"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (True, "true or false"),
        (1, "an integer"),
        (1.0, "a number"),
        ("", "a string"),
        ([], "a list"),
        ({}, "an object"),
        (None, "null"),
        ((), "tuple"),
    ],
)
def test_values_are_named_as_in_json(value: object, name: str) -> None:
    assert kind(value) == name


@pytest.mark.parametrize(
    ("accept", "value"),
    [
        (integer, 0),
        (integer, 10**400),
        (number, 1.5),
        (boolean, False),
        (string, ""),
        (string, "\U0001f600\0"),
    ],
)
def test_value_of_the_type_is_returned_as_it_is(
    accept: Callable[[object, object], object], value: object
) -> None:
    assert accept(value, None) is value


def test_integer_is_a_number() -> None:
    found = number(5, None)
    assert (found, type(found)) == (5.0, float)


@pytest.mark.parametrize(
    ("accept", "value", "words"),
    [
        (integer, True, "must be an integer, not true or false"),
        (integer, 1.0, "must be an integer, not a number"),
        (integer, "1", "must be an integer, not a string"),
        (integer, Count(1), "must be an integer, not Count"),
        (number, True, "must be a number, not true or false"),
        (number, "1", "must be a number, not a string"),
        (number, None, "must be a number, not null"),
        (boolean, 1, "must be true or false, not an integer"),
        (boolean, "false", "must be true or false, not a string"),
        (string, 1, "must be a string, not an integer"),
        (string, ["a"], "must be a string, not a list"),
        (string, Text("a"), "must be a string, not Text"),
    ],
)
def test_value_of_another_type_is_refused_by_its_kind(
    accept: Callable[[object, object], object], value: object, words: str
) -> None:
    with pytest.raises(TypeError, match=f"^{words}$"):
        accept(value, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400)])
def test_number_is_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"^must be a finite number$"):
        number(value, None)


def test_string_is_text_that_utf8_can_encode() -> None:
    with pytest.raises(ValueError, match="a lone surrogate") as refused:
        string(SURROGATE, None)
    assert refused.value.__suppress_context__


@pytest.mark.parametrize(
    ("values", "are"),
    [
        ((), True),
        (([],), True),
        ((["a", "b"], ["c"]), True),
        ((["a", 1],), False),
        ((["a"], [None]), False),
        (([Text("a")],), False),
        ((["a", SURROGATE],), False),
        ((["\ud83d", "\ude00"],), False),
        ((["a"], [SURROGATE]), False),
    ],
)
def test_many_strings_are_strings_where_each_is_one(
    values: tuple[list[object], ...], *, are: bool
) -> None:
    assert are_strings(*values) is are


def test_keys_of_an_object_are_looked_at() -> None:
    assert are_strings({"a": 1}.keys())
    assert not are_strings({1: "a"}.keys())


def test_member_is_found_by_its_value() -> None:
    assert member("red", Colour) is Colour.RED
    for value in ("RED", "Red", ""):
        with pytest.raises(ValueError, match=r"^must be one of red, blue$"):
            member(value, Colour)
    with pytest.raises(TypeError, match="not an integer"):
        member(1, Colour)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-01-31T12:00:00Z", datetime(2026, 1, 31, 12, tzinfo=UTC)),
        ("2026-01-31T12:00:00+02:00", datetime(2026, 1, 31, 10, tzinfo=UTC)),
    ],
)
def test_moment_is_returned_in_utc(text: str, at: datetime) -> None:
    found = moment(text, None)
    assert found == at
    assert found.tzinfo is UTC


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("today", "must be a date and time"),
        ("2026-02-30T12:00:00Z", "must be a date and time"),
        ("2026-01-31T12:00:00", "must carry a time zone"),
        ("0001-01-01T00:00:00+01:00", "between the years 1 and 9999"),
        ("9999-12-31T23:59:59-01:00", "between the years 1 and 9999"),
    ],
)
def test_other_text_is_no_moment(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        moment(text, None)


def test_literal_is_one_of_its_values_and_of_its_type() -> None:
    one = Literal["a", 1]
    assert literal("a", one) == "a"
    assert literal(1, one) == 1
    for value in ("b", True, 1.0, None):
        with pytest.raises(ValueError, match=r"^must be one of a, 1$"):
            literal(value, one)
