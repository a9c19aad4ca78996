"""Lists of cores: what has the form of one, and which cores it names."""

import pytest

from jobworker.core_list import MAX_LENGTH, is_core_list, parse_cores


@pytest.mark.parametrize(
    ("text", "cores"),
    [("", set()), ("0", {0}), ("0-3", {0, 1, 2, 3}), ("5,0-1,7", {0, 1, 5, 7}), ("3-1", set())],
)
def test_list_of_cores_is_read(text: str, cores: set[int]) -> None:
    assert parse_cores(text) == cores


@pytest.mark.parametrize(
    "text", ["0", "0-3", "5,0-1,7", "3-1", "0," * (MAX_LENGTH // 2 - 1) + "10"]
)
def test_form_of_a_list_is_taken(text: str) -> None:
    assert is_core_list(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "0,",
        "-1",
        "0--1",
        "0-1-2",
        "a",
        " 0",
        "0\n",
        "12345",
        "\u0663",
        "0" + ",0" * MAX_LENGTH,
    ],
)
def test_other_text_is_no_list(text: str) -> None:
    assert not is_core_list(text)
