"""A job's whole record as JSON, made without keeping other clients waiting.

What the history has as JSON already goes out as it is stored; what is in memory is encoded in
pieces (`jobs.history.spec_json`), with a checkpoint after each long one.
"""

from functools import partial

import trio

from jobworker.convert import structure, unstructure
from jobworker.jobs.history.spec_json import spec_pieces
from jobworker.json_text import dumps, loads
from jobworker.model.job import JobRecord, JobSpec
from jobworker.model.summary import summarize
from jobworker.threads import in_thread

LONG = 1000
"""Characters of a piece after which others get their turn."""


_last: tuple[JobRecord, JobRecord, str] | None = None
"""A record, its summary and the JSON of that: what was told last."""


def summary_of(record: JobRecord) -> tuple[JobRecord, str]:
    """A record's summary and its JSON, made once for all who are told of one record in turn.

    A job's end wakes everybody who waits for it or follows it, in one turn of the event loop.
    """
    global _last  # noqa: PLW0603 - one entry, for the one thread of the event loop
    if _last is None or _last[0] is not record:
        summary = summarize(record)
        _last = record, summary, dumps(unstructure(summary))
    return _last[1:]


async def encode_record(record: JobRecord) -> str:
    """The JSON of a record that is in memory as a whole.

    A summary stays one, and says so: the job was removed before the rest was read.
    """
    if record.abridged:
        return summary_of(record)[1]
    summary = summarize(record)
    made = list[str]()
    for piece in spec_pieces(record.spec, summary):
        made.append(piece)
        if len(piece) > LONG:
            await trio.lowlevel.checkpoint()
    return with_spec(summary, "".join(made))


def with_spec(summary: JobRecord, spec: str) -> str:
    """The JSON of a whole record, of its summary and the JSON of the request."""
    plain = {name: value for name, value in unstructure(summary).items() if name != "spec"}
    rest = dumps({**plain, "abridged": []})
    return f'{{"spec":{spec},{rest[1:]}'


async def read_spec(text: str) -> JobSpec:
    """The request of which the history has JSON: in a thread, since it may be long."""
    return await in_thread(partial(_read_spec, text))


def _read_spec(text: str) -> JobSpec:
    return structure(JobSpec, loads(text, bounded=True))
