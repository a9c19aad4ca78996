"""A job's whole record as JSON, made without keeping others waiting.

A request may have a megabyte of arguments and variables, and turning that into JSON at once would
stall every other client. So the long parts are made in pieces, with a checkpoint after each; what
the history has as JSON already goes out as it is stored.
"""

from collections.abc import Iterable
from functools import partial
from itertools import islice

import trio

from jobworker.convert import dumps, loads, structure, unstructure
from jobworker.model.job import JobRecord, JobSpec
from jobworker.model.summary import summarize

PIECE_ENTRIES = 500
PIECE_CHARACTERS = 65_536


async def encode_record(record: JobRecord) -> str:
    """The JSON of a record that is in memory as a whole."""
    summary = summarize(record)
    plain = unstructure(summary)
    spec = plain["spec"]
    parts = {name: dumps(value) for name, value in spec.items()}
    for part in summary.abridged:
        value = getattr(record.spec, part)
        if isinstance(value, dict):
            parts[part] = "{" + await _joined(f"{dumps(k)}:{dumps(v)}" for k, v in value.items())
            parts[part] += "}"
        elif part == "command":
            parts[part] = "[" + await _joined(dumps(each) for each in value) + "]"
        else:
            parts[part] = dumps(unstructure(value))
    inner = ",".join(f"{dumps(name)}:{text}" for name, text in parts.items())
    return with_spec(plain, f"{{{inner}}}")


def with_spec(plain: dict[str, object], spec: str) -> str:
    """The JSON of a record whose request is JSON already; `plain` is that of its summary."""
    rest = dumps({**{k: v for k, v in plain.items() if k != "spec"}, "abridged": []})
    return f'{{"spec":{spec},{rest[1:]}'


async def read_spec(text: str) -> JobSpec:
    """The request of which the history has JSON: in a thread, since it may be long."""
    return await trio.to_thread.run_sync(partial(_read_spec, text))


def _read_spec(text: str) -> JobSpec:
    return structure(JobSpec, loads(text))


async def _joined(pieces: Iterable[str]) -> str:
    made, left = list[str](), iter(pieces)
    while piece := _next_piece(left):
        made.append(",".join(piece))
        await trio.lowlevel.checkpoint()
    return ",".join(made)


def _next_piece(pieces: Iterable[str]) -> list[str]:
    piece, size = list[str](), 0
    for each in islice(pieces, PIECE_ENTRIES):
        piece.append(each)
        size += len(each)
        if size > PIECE_CHARACTERS:
            break
    return piece
