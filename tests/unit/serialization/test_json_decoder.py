"""The decoder for long texts: it takes and refuses what Python's own does, and counts."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobworker.serialization.json_decoder import MAX_STRING_CHARACTERS, CooperativeDecoder

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def decode(text: str, max_depth: int = 1000, max_values: int = 1_000_000) -> object:
    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not JSON")

    return CooperativeDecoder(
        text=text,
        object_pairs_hook=dict,
        parse_constant=refuse,
        parse_float=float,
        max_depth=max_depth,
        max_values=max_values,
    ).decode()


def outcome(decoder: object, text: str) -> object:
    try:
        return decoder(text)  # type: ignore[operator]
    except ValueError:
        return ValueError


def plain(text: str) -> object:
    def refuse(constant: str) -> object:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_what_python_writes_is_read_back(value: object, indent: int | None, ascii_: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_)
    assert decode(text) == value


@given(
    VALUES,
    st.integers(0, 200),
    st.text(st.characters(max_codepoint=255), max_size=2),
    st.integers(0, 3),
)
@example([1], 1, "", 1)
@example(["a"], 2, "\n", 0)
@example([1], 0, "\ufeff", 0)
def test_what_python_refuses_is_refused(value: object, at: int, more: str, less: int) -> None:
    text = json.dumps(value)
    text = text[:at] + more + text[at + less :]
    assert outcome(decode, text) == outcome(plain, text)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "[1,]", "[,1]", '{"a":1,}', '{"a" 1}', "{1:2}", "01", "-", "1.", ".5", "1e"),
        *("+1", "nul", "NaN", "[1 2]", "1 2", '"\n"', '"\\x"', '"a', "'a'", "[", "{", '{"a":'),
    ],
)
def test_malformed_text_is_refused(text: str) -> None:
    assert outcome(decode, text) is ValueError


def test_values_and_levels_are_counted_as_they_come() -> None:
    assert decode("[[1],[2]]", max_depth=2, max_values=5) == [[1], [2]]
    with pytest.raises(ValueError, match="nested deeper than 1 levels"):
        decode("[[1],[2]]", max_depth=1)
    with pytest.raises(ValueError, match="more than 4 values"):
        decode("[[1],[2]]", max_values=4)
    with pytest.raises(ValueError, match="nested deeper than 32"):
        decode("[" * 4_000_000, max_depth=32)


@given(
    st.lists(PLAIN, min_size=60, max_size=140)
    | st.dictionaries(st.text(max_size=3), PLAIN, min_size=60, max_size=140),
    st.integers(0, 1000),
    st.sampled_from(["", ",", '"', "\\", "{", "]", "x", "\n", "0", "1e999", ":", "{}", "[[]],"]),
    st.integers(0, 2),
)
def test_many_plain_entries_are_taken_as_python_takes_them(
    value: object, at: int, more: str, less: int
) -> None:
    text = json.dumps(value)
    text = text[:at] + more + text[at + less :]
    assert repr(outcome(decode, text)) == repr(outcome(plain, text))


@pytest.mark.parametrize("text", ["[" + "1," * 200 + "1]", "[" + "[]," * 200 + "[]]"])
def test_each_of_many_plain_entries_counts(text: str) -> None:
    assert decode(text, max_values=202, max_depth=2) == json.loads(text)
    with pytest.raises(ValueError, match="more than 201 values"):
        decode(text, max_values=201)
    with pytest.raises(ValueError, match="nested deeper than 1 levels"):
        decode(f"[{text}]", max_depth=1)


def test_long_string_is_read_within_a_bound() -> None:
    longest = "\\u0041" * ((MAX_STRING_CHARACTERS - 6) // 6)
    assert decode(f'["{longest}"]') == [longest.replace("\\u0041", "A")]
    for too_long in ("a" * MAX_STRING_CHARACTERS, "\\n" * MAX_STRING_CHARACTERS):
        with pytest.raises(ValueError, match="a string in it has more than"):
            decode(f'["{too_long}"]')


@pytest.mark.parametrize("wrong", ['"\\x"', '"\\u12x4"', '"a\nb"'])
def test_wrong_string_is_told_as_python_tells_it_however_long_the_text(wrong: str) -> None:
    for before in (0, 5000):
        text = f'["{"a" * before}",{wrong},"{"b" * MAX_STRING_CHARACTERS}"]'
        with pytest.raises(json.JSONDecodeError) as told:
            decode(text)
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(text)
        assert told.value.msg == expected.value.msg
