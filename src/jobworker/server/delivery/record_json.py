"""A job's whole record as JSON, encoded without delaying other clients.

A request that the history stores as JSON goes out as it is. A request in memory is encoded in
pieces (`jobs.history.spec_json`), with a checkpoint after each long piece.
"""

from functools import partial

import trio

from jobworker.jobs.history.spec_json import spec_pieces
from jobworker.model.job import JobRecord, JobSpec
from jobworker.model.summary import summarize
from jobworker.serialization.convert import structure, unstructure
from jobworker.serialization.json_text import dumps, loads
from jobworker.threads import in_thread

LONG = 1000
"""A piece of more characters is followed by a checkpoint, so that other tasks run."""


_last: tuple[JobRecord, JobRecord, str] | None = None
"""A cache of one entry: the last record, its summary and the JSON of the summary."""


def summary_of(record: JobRecord) -> tuple[JobRecord, str]:
    """A record's summary and its JSON; successive calls for one record encode it once.

    A job's end wakes all clients that wait for the job or follow it, in one turn of the event loop.
    """
    global _last  # noqa: PLW0603 - one entry, for the one thread of the event loop
    if _last is None or _last[0] is not record:
        summary = summarize(record)
        _last = record, summary, dumps(unstructure(summary))
    return _last[1:]


async def encode_record(record: JobRecord) -> str:
    """The JSON of a record that is in memory as a whole.

    For a summary it is the summary's JSON, with its `abridged`: the job was removed before the rest
    could be read.
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
    """The JSON of a whole record, made from its summary and the JSON of its request."""
    plain = {name: value for name, value in unstructure(summary).items() if name != "spec"}
    rest = dumps({**plain, "abridged": []})
    return f'{{"spec":{spec},{rest[1:]}'


async def read_spec(text: str) -> JobSpec:
    """Decode the JSON of a request from the history, in a thread, since it may be long."""
    return await in_thread(partial(_read_spec, text))


def _read_spec(text: str) -> JobSpec:
    return structure(JobSpec, loads(text, bounded=True))
