"""JSON in pieces joins to what the encoder makes at once, and none is long."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.serialization.json_pieces import PIECE_CHARACTERS, PIECE_ENTRIES, batches_of, pieces
from jobworker.serialization.json_text import dumps

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(VALUES.filter(lambda value: "Infinity" not in json.dumps(value)))
def test_pieces_join_to_the_whole(value: object) -> None:
    assert "".join(pieces(value, dumps)) == dumps(value)


@pytest.mark.parametrize(
    "value",
    [
        {"order": {"environment": {f"V{n}": "é\n" * 4 for n in range(45_000)}, "job": 7}},
        {"arguments": ["a"] * 100_000},
        [["a", {}]] * 20_000,
        ["x" * 100_000] * 8,
        list(range(100_000)),
    ],
)
def test_no_piece_is_long(value: object) -> None:
    made = list(pieces(value, dumps))
    assert "".join(made) == dumps(value)
    assert max(map(len, made)) <= PIECE_CHARACTERS + 100_000 + PIECE_ENTRIES
    assert len(made) >= 8


def test_batches_have_each_variable_once() -> None:
    variables = {f"V{n}": "x" * 300 for n in range(2_000)}
    batches = list(batches_of(variables))
    assert {name: value for batch in batches for name, value in batch.items()} == variables
    assert all(len(batch) <= PIECE_ENTRIES for batch in batches)
    assert sum(map(len, batches)) == 2_000
