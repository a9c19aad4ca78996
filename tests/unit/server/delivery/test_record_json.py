"""Whole records as JSON say the same, however they are made; a summary never passes for one."""

import json

import trio
import trio.testing
from hypothesis import given

from jobworker.model.job import JobRecord, JobSpec
from jobworker.model.summary import summarize
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps
from jobworker.server.delivery.record_json import encode_record, read_spec, summary_of, with_spec

from ...strategies import examples, record, records


@examples(max_examples=100)
@given(records)
def test_whole_record_is_what_the_converter_makes(stored: JobRecord) -> None:
    whole = unstructure(stored)
    assert json.loads(trio.run(encode_record, stored)) == whole
    text = dumps(unstructure(stored.spec))
    assert json.loads(with_spec(summarize(stored), text)) == whole
    assert trio.run(read_spec, text) == stored.spec


async def test_large_record_is_made_in_many_turns() -> None:
    spec = JobSpec(command=("true",), environment={f"V{n}": "x" * 10 for n in range(45_000)})
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await encode_record(record(1, spec=spec))
        nursery.cancel_scope.cancel()
    assert turns > 40


async def test_summary_is_told_as_one() -> None:
    summary = summarize(record(1, spec=JobSpec(command=("true",), environment={"A": "1"})))
    assert json.loads(await encode_record(summary))["abridged"] == ["environment"]


def test_summary_is_made_once_for_all_who_are_told() -> None:
    stored = record(1, spec=JobSpec(command=("true",), environment={"A": "1"}))
    assert summary_of(stored)[1] is summary_of(stored)[1]
    other = record(2)
    assert summary_of(other)[0].id == 2
    assert summary_of(stored)[0] == summarize(stored)
