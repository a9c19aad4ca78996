"""JSON as text: strict where Python's reader is not, and bounded where it comes from others."""

import json
import math

import pytest

from jobworker.errors import MOST_QUOTED, MalformedJSON
from jobworker.serialization.json_text import (
    LONG_CHARACTERS,
    MANY_CONTAINERS,
    MAX_DEPTH,
    MAX_VALUES,
    dumps,
    loads,
    takes_long,
)

PADDING = " " * LONG_CHARACTERS


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("padding", ["", PADDING], ids=["short", "long"])
def test_text_is_read_as_its_values(padding: str, *, bounded: bool) -> None:
    text = '{"a": [1, -2.5, true, null], "b": {"c": "\\u00e4"}}'
    assert loads(text + padding, bounded=bounded) == {
        "a": [1, -2.5, True, None],
        "b": {"c": "ä"},
    }


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("padding", ["", PADDING], ids=["short", "long"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"b": 2, "a": 1, "a": 3}', "the key 'a' appears twice in one object"),
        ('[{"b": {"a": 1, "a": 1}}]', "the key 'a' appears twice in one object"),
        ("NaN", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("1e999", "the number 1e999 is out of range"),
        ("[-1e999]", "the number -1e999 is out of range"),
        ("", "Expecting value"),
        ("{'a': 1}", "Expecting property name"),
        ("1 2", "Extra data"),
    ],
)
def test_what_is_no_strict_json_is_refused_with_the_reason(
    text: str, words: str, padding: str, *, bounded: bool
) -> None:
    with pytest.raises(MalformedJSON, match="cannot read the message as JSON: ") as refused:
        loads(text + padding, bounded=bounded)
    assert words in refused.value.message
    assert refused.value.__suppress_context__


def test_same_key_may_stand_in_two_objects() -> None:
    assert loads('[{"a": 1}, {"a": {"a": 2}}]') == [{"a": 1}, {"a": {"a": 2}}]


def test_long_key_and_number_are_told_in_part() -> None:
    key = "k" * 1000
    with pytest.raises(MalformedJSON) as refused:
        loads(f'{{"{key}": 1, "{key}": 2}}')
    assert MOST_QUOTED - 10 <= refused.value.message.count("k") <= MOST_QUOTED + 10
    with pytest.raises(MalformedJSON) as refused:
        loads("9" * 1000 + ".0")
    assert refused.value.message.count("9") == 20


@pytest.mark.parametrize("padding", ["", PADDING], ids=["short", "long"])
def test_text_of_others_is_nested_to_a_bound(padding: str) -> None:
    assert loads(nested(MAX_DEPTH) + padding, bounded=True)
    deeper = nested(MAX_DEPTH + 1) + padding
    with pytest.raises(MalformedJSON, match="nested deeper"):
        loads(deeper, bounded=True)
    assert loads(deeper), "ours may be deeper"


def test_objects_are_levels_too() -> None:
    text = '{"a":[' * (MAX_DEPTH // 2) + "]}" * (MAX_DEPTH // 2)
    assert loads(text, bounded=True)
    with pytest.raises(MalformedJSON, match="nested deeper"):
        loads(f'{{"a":{text}}}', bounded=True)


def test_many_shallow_lists_are_not_deep() -> None:
    text = f"[{','.join(['[]'] * 2 * MAX_DEPTH)}]"
    assert loads(text, bounded=True) == [[]] * (2 * MAX_DEPTH)


def test_recursion_of_the_reader_is_an_error_of_the_text() -> None:
    with pytest.raises(MalformedJSON, match=r"^cannot read the message: it is nested too deeply$"):
        loads(nested(100_000))


def test_text_of_others_has_a_bounded_number_of_values() -> None:
    text = f"[{','.join('1' * (MAX_VALUES + 1))}]"
    with pytest.raises(MalformedJSON, match="values"):
        loads(text, bounded=True)
    assert loads(text)


@pytest.mark.parametrize("make", [str, str.encode])
def test_text_beyond_a_length_takes_long(make: type) -> None:
    assert not takes_long(make(" " * LONG_CHARACTERS))
    assert takes_long(make(" " * (LONG_CHARACTERS + 1)))


@pytest.mark.parametrize(("part", "weight"), [("[", 1), ("{", 1), (",,,,", 1), (",", 0)])
def test_text_of_many_containers_takes_long(part: str, weight: int) -> None:
    text = part * MANY_CONTAINERS
    assert not takes_long(text)
    assert takes_long(text + "[") is bool(weight)


def test_binary_message_is_not_decoded_and_so_takes_no_time() -> None:
    assert not takes_long(b"[" * (MANY_CONTAINERS + 1))


def test_values_are_written_on_one_line_as_they_are() -> None:
    value = {"a": [1, 2.5, None, True], "b": "ä\n\u2028"}
    text = dumps(value)
    assert text == '{"a":[1,2.5,null,true],"b":"ä\\n\u2028"}'
    assert json.loads(text) == value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_of_json_is_not_written(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps([value])
