"""The converter: exact types or a fault with the path of its value, never anything else."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Literal

import pytest
from attrs import field, frozen
from hypothesis import example, given
from hypothesis import strategies as st

from jobworker.errors import InvalidParams, MalformedJSON
from jobworker.model.bounds import within
from jobworker.model.job import JobRecord
from jobworker.serialization.convert import MAX_REPORTED_FAULTS, faults_of, structure, unstructure
from jobworker.serialization.json_text import dumps, loads, takes_long

from ..strategies import any_text, examples, objects_with, plain_values, records


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@frozen(kw_only=True)
class Inner:
    number: int = field(default=0, validator=within(0, 9))


@frozen(kw_only=True)
class Sample:
    number: int = field(default=0, validator=within(0, 9))
    ratio: float = 0.0
    maybe: float | None = field(default=None, validator=within(0, 9))
    flag: bool = False
    text: str = ""
    words: tuple[str, ...] = ()
    table: Mapping[str, str] = field(factory=dict)
    colour: Colour = Colour.RED
    time: datetime | None = None
    choice: Literal["a", "b"] = "a"
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()


KEYS = list(Sample.__annotations__)


def faults(value: object) -> tuple[str, ...]:
    made, told = faults_of(Sample, value)
    assert (made is None) == bool(told)
    return told


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("number", True, "must be an integer, not true or false"),
        ("number", "5", "must be an integer, not a string"),
        ("number", 5.0, "must be an integer, not a number"),
        ("number", None, "must be an integer, not null"),
        ("number", 10, "must be from 0 to 9, not 10"),
        ("ratio", True, "must be a number, not true or false"),
        ("ratio", "1.5", "must be a number, not a string"),
        ("ratio", float("nan"), "must be a finite number"),
        ("ratio", float("inf"), "must be a finite number"),
        ("ratio", 10**400, "must be a finite number"),
        ("flag", 1, "must be true or false, not an integer"),
        ("flag", "false", "must be true or false, not a string"),
        ("text", 5, "must be a string, not an integer"),
        ("text", None, "must be a string, not null"),
        ("text", "a\ud800", "must be Unicode text: it holds a lone surrogate"),
        ("words", "abc", "must be a list, not a string"),
        ("words", {"a": "b"}, "must be a list, not an object"),
        ("table", [["a", "b"]], "must be an object, not a list"),
        ("table", "ab", "must be an object, not a string"),
        ("table", None, "must be an object, not null"),
        ("colour", "green", "must be one of red, blue"),
        ("colour", 0, "must be a string, not an integer"),
        ("time", "2026-01-31T12:00:00", "must carry a time zone, such as 2026-01-31T12:00:00Z"),
        ("time", "x", "must be a date and time, such as 2026-01-31T12:00:00Z"),
        ("time", "9999-12-31T23:59:59-01:00", "must lie between the years 1 and 9999 in UTC"),
        ("choice", "c", "must be one of a, b"),
        ("choice", ["a"], "must be one of a, b"),
        ("inner", [], "must be an object, not a list"),
    ],
)
def test_value_of_another_type_is_refused_with_its_path(key: str, value: object, told: str) -> None:
    assert faults({key: value}) == (f"{key}: {told}",)


def test_mapping_is_checked_each_time_and_not_only_the_first() -> None:
    for _ in range(3):
        assert faults({"table": []}) == ("table: must be an object, not a list",)
    for _ in range(3):
        structure(Sample, {"table": {"a": "b"}})
        assert faults({"table": []}) == ("table: must be an object, not a list",)


def test_path_leads_through_lists_and_objects() -> None:
    assert faults({"words": ["a", 1]}) == ("words[1]: must be a string, not an integer",)
    assert faults({"table": {"k": 1}}) == ("table['k']: must be a string, not an integer",)
    assert faults({"inners": [{}, {"number": 10}]}) == (
        "inners[1].number: must be from 0 to 9, not 10",
    )


def test_unknown_keys_are_refused_wherever_they_stand() -> None:
    assert faults({"nunber": 1}) == ("unknown key 'nunber'",)
    assert faults({"inner": {"x": 1, "y": 2}}) == ("inner: unknown key 'x', 'y'",)


def test_missing_key_is_told() -> None:
    assert "owner: is missing" in faults_of(JobRecord, {"id": 1})[1]


def test_key_with_a_lone_surrogate_is_refused_in_words_that_can_be_sent() -> None:
    told = faults({"table": {"\ud800": "x"}, "\udfff": 1})
    assert len(told) == 2
    "".join(told).encode()


def test_all_faults_are_told_at_once() -> None:
    told = faults({"number": "x", "flag": 1, "inner": {"number": 77}, "colour": "x", "y": 1})
    assert len(told) == 5
    assert {fault.split(":")[0] for fault in told[:-1]} <= {
        *("number", "flag", "inner.number", "colour", "unknown key 'y'")
    }


def test_faults_are_capped_in_number() -> None:
    told = faults({"words": list(range(1000))})
    assert len(told) == MAX_REPORTED_FAULTS


def test_structure_raises_every_fault_in_words_and_as_data() -> None:
    with pytest.raises(InvalidParams) as caught:
        structure(Sample, {"number": "x", "flag": 1})
    told = caught.value.data["faults"]
    assert isinstance(told, list)
    assert [f"{fault['path']}: {fault['problem']}" for fault in told] == (
        caught.value.message.split("; ")
    )
    assert len(caught.value.message.split("; ")) == 2


def test_sound_value_is_taken_exactly() -> None:
    made = structure(
        Sample,
        {
            "number": 9,
            "ratio": 2,
            "flag": True,
            "words": ["a", ""],
            "table": {"k": "v"},
            "colour": "blue",
            "time": "2026-01-31T13:00:00+01:00",
            "choice": "b",
            "inners": [{"number": 1}],
        },
    )
    assert made == Sample(
        number=9,
        ratio=2.0,
        flag=True,
        words=("a", ""),
        table={"k": "v"},
        colour=Colour.BLUE,
        time=datetime(2026, 1, 31, 12, tzinfo=UTC),
        choice="b",
        inners=(Inner(number=1),),
    )
    assert type(made.ratio) is float


def test_time_is_written_in_utc() -> None:
    plain = unstructure(Sample(time=datetime.fromisoformat("2026-01-31T13:00:00.5+01:00")))
    assert plain["time"] == "2026-01-31T12:00:00.500000Z"


@examples(max_examples=150)
@given(records)
def test_record_comes_back_from_json_as_it_was(record: JobRecord) -> None:
    assert structure(JobRecord, loads(dumps(unstructure(record)))) == record


@examples(max_examples=300)
@given(plain_values | objects_with(KEYS))
@example({"number": "x", "maybe": 10**400})
@example({"number": "x", "table": []})
@example({"number": "x", "time": "0001-01-01T00:00:00+01:00"})
def test_no_value_raises_anything_but_invalid_params(value: object) -> None:
    made, told = faults_of(Sample, value)
    if made is not None:
        assert structure(Sample, loads(dumps(unstructure(made)))) == made
        return
    assert told
    "".join(told).encode()  # it can be sent
    with pytest.raises(InvalidParams):
        structure(Sample, value)


# --- JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' appears twice"),
        ('[{"x": {"a": 1, "a": 2}}]', "the key 'a' appears twice"),
        ("NaN", "NaN is not JSON"),
        ("[Infinity]", "Infinity is not JSON"),
        ("-Infinity", "-Infinity is not JSON"),
        ("1e999", "the number 1e999 is out of range"),
        ("-1e999", "the number -1e999 is out of range"),
        ("9" * 5000, "a number has too many digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
        ("{'a': 1}", "Expecting property name"),
    ],
    ids=lambda value: value[:20],
)
def test_text_that_is_no_json_of_ours_is_refused(text: str, told: str) -> None:
    with pytest.raises(MalformedJSON, match=told):
        loads(text)


@examples(max_examples=300)
@given(any_text | st.text('{}[]":,0123456789eE+-.\\untrfalsd ', max_size=40))
def test_no_text_raises_anything_but_malformed_json(text: str) -> None:
    try:
        loads(text)
    except MalformedJSON as error:
        str(error).encode()


@examples(max_examples=200)
@given(plain_values)
def test_json_comes_back_as_it_was_in_one_line(value: object) -> None:
    try:
        text = dumps(value)
    except ValueError:  # NaN and the infinities, which JSON cannot tell
        with pytest.raises(ValueError, match="not JSON compliant"):
            json.dumps(value, allow_nan=False)
        return
    assert "\n" not in text
    assert loads(text) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 33 + "]" * 33, "nested deeper than 32 levels"),
        ('{"a":' * 33 + "1" + "}" * 33, "nested deeper than 32 levels"),
        ("[" * 4_000_000, "nested deeper than 32 levels"),
        ("[" + "1," * 100_000 + "1]", "more than 100000 values"),
        ("[" + "[]," * 110_000 + "[]]", "more than 100000 values"),
        ('"' + '\\"' * 100_000 + "[" * 100, "Unterminated string"),
        ("[" * 40 + '"' + '\\"' * 100_000, "nested deeper"),
    ],
    ids=lambda text: text[:20],
)
def test_shape_that_strangers_may_not_send_is_refused_before_it_is_parsed(
    text: str, told: str
) -> None:
    with pytest.raises(MalformedJSON, match=told):
        loads(text, bounded=True)


@pytest.mark.parametrize(
    "value",
    [
        "[{" * 1000 + "," * 200_000 + '"\\',
        ["x" * 100, "[" * 100, '"[' * 50],
        list(range(99_000)),
        {"a": [[]] * 40_000},
        [[[[[[[[["\\"]]]]]]]]],
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_stands_in_strings_counts_for_nothing(value: object) -> None:
    assert loads(dumps(value), bounded=True) == value


@pytest.mark.parametrize(
    ("text", "takes"),
    [
        ("x" * 16_000, False),
        ("x" * 17_000, True),
        ("[" * 400 + "]" * 400, False),
        ("[" + "{}," * 600 + "{}]", True),
        ("[" + "1e9," * 3000 + "1]", True),
        ("[" + "1e9," * 300 + "1]", False),
    ],
)
def test_text_takes_long_by_its_length_and_by_its_values(text: str, takes: bool) -> None:
    assert takes_long(text) == takes
