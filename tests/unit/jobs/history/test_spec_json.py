"""The pieces of a request's JSON join to what the converter makes, and none is long."""

import json

import pytest
from hypothesis import given

from jobworker.jobs.history.spec_json import spec_pieces
from jobworker.model.job import MAX_ARGUMENT_BYTES, JobRecord, JobSpec
from jobworker.model.summary import summarize
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_pieces import PIECE_CHARACTERS

from ...strategies import examples, record, records


@examples(max_examples=200)
@given(records)
def test_pieces_join_to_the_whole(stored: JobRecord) -> None:
    text = "".join(spec_pieces(stored.spec, summarize(stored)))
    assert json.loads(text) == unstructure(stored.spec)


@pytest.mark.parametrize(
    "spec",
    [
        JobSpec(command=("true",), environment={f"V{n}": "é\n" * 4 for n in range(45_000)}),
        JobSpec(command=("true", *(f"argument {n}" for n in range(16_000)))),
        JobSpec(command=("x" * MAX_ARGUMENT_BYTES,) * 8),
        JobSpec(command=("true",), secret_environment={f"V{n}": "***" for n in range(45_000)}),
    ],
)
def test_no_piece_is_long(spec: JobSpec) -> None:
    pieces = list(spec_pieces(spec, summarize(record(1, spec=spec))))
    assert json.loads("".join(pieces)) == unstructure(spec)
    assert max(map(len, pieces)) < PIECE_CHARACTERS + 2 * MAX_ARGUMENT_BYTES
    assert len(pieces) > 40
