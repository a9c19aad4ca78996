"""Classes that callers construct: each invalid value is InvalidParams, which names it."""

from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

import pytest
from attrs import field, frozen

from jobworker.errors import InvalidParams
from jobworker.model.bounds import within
from jobworker.model.checked_classes import evolve_unchecked, raises_invalid_params


class Colour(Enum):
    RED = "red"


@frozen
class Inner:
    count: int = 0


def _check_text(_: object, __: object, value: str) -> None:
    if value == "unfit":
        raise ValueError("is unfit")
    if value == "params":
        raise InvalidParams("in its own words")


def _check_named(_: object, __: object, value: Mapping[str, str]) -> None:
    for name in value.keys():  # noqa: SIM118 - what is no mapping raises AttributeError
        if not name:
            raise ValueError("has an empty name")


@raises_invalid_params
@frozen(kw_only=True)
class Made:
    """Has a field of each kind."""

    text: str = field(validator=_check_text)
    count: int = field(default=0, validator=within(0, 9))
    seconds: float | None = field(default=None, validator=within(0, 9))
    flag: bool = False
    inner: Inner = Inner()
    choice: Literal["red", "blue"] = "red"
    maybe: Literal["red"] | None = None
    many: tuple[str, ...] = ()
    named: Mapping[str, str] = field(factory=dict, validator=_check_named)


def refusal(**values: Any) -> str:
    with pytest.raises(InvalidParams) as refused:
        Made(**values)
    assert refused.value.__suppress_context__ or refused.value.message == "in its own words"
    return refused.value.message


def test_valid_values_are_taken() -> None:
    made = Made(text="a", count=9, seconds=1, flag=True, inner=Inner(3), choice="blue", maybe="red")
    assert (made.text, made.count, made.seconds, made.flag) == ("a", 9, 1, True)
    assert (made.inner, made.choice, made.maybe) == (Inner(3), "blue", "red")
    assert Made(text="a", maybe=None, seconds=None) == Made(text="a")


def test_values_are_given_by_name() -> None:
    with pytest.raises(InvalidParams, match=r"^cannot make a Made: give its values by name$"):
        Made("a")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"text": 5}, "text: must be a string, not an integer"),
        ({"text": b"a"}, "text: "),
        ({"text": None}, "text: must be a string, not null"),
        ({"count": True}, "count: must be an integer, not true or false"),
        ({"count": 1.0}, "count: must be an integer, not a number"),
        ({"count": None}, "count: "),
        ({"count": 10}, "count: must be "),
        ({"seconds": "1"}, "seconds: "),
        ({"seconds": True}, "seconds: "),
        ({"seconds": -1}, "seconds: "),
        ({"flag": 1}, "flag: must be true or false, not an integer"),
        ({"inner": 5}, "inner: "),
        ({"inner": None}, "inner: "),
        ({"choice": "green"}, "choice: "),
        ({"choice": None}, "choice: "),
        ({"maybe": "blue"}, "maybe: "),
        ({"choice": []}, "choice: "),
    ],
)
def test_invalid_value_is_named(values: dict[str, object], words: str) -> None:
    told = refusal(**{"text": "a", **values})
    assert told.startswith("cannot make a Made: ")
    assert words in told


def test_every_invalid_value_is_named() -> None:
    told = refusal(text=5, flag=1)
    assert "text: must be a string" in told
    assert "flag: must be true or false" in told


def test_missing_and_unknown_names_are_told() -> None:
    assert "text" in refusal()
    assert "wrong" in refusal(text="a", wrong=1)


def test_member_of_an_enumeration_stands_for_its_value() -> None:
    made = Made(text="a", choice=Colour.RED)  # type: ignore[arg-type]
    assert made.choice == "red"
    assert type(made.choice) is str


def test_member_with_a_wrong_value_is_refused() -> None:
    assert "count: " in refusal(text="a", count=Colour.RED)


def test_whatever_a_validator_raises_is_an_error_of_the_parameters() -> None:
    assert "named: must be an object" in refusal(text="a", named=[1])
    assert "named: has an empty name" in refusal(text="a", named={"": "b"})
    assert "text: is unfit" in refusal(text="unfit")


def test_error_of_the_parameters_keeps_its_words() -> None:
    assert refusal(text="params") == "in its own words"


def test_copy_has_other_values_and_no_check_runs() -> None:
    made = Made(text="a", count=1)
    other = evolve_unchecked(made, text="unfit", count=99)
    assert (other.text, other.count, other.flag) == ("unfit", 99, False)
    assert (made.text, made.count) == ("a", 1)
    assert type(other) is Made
