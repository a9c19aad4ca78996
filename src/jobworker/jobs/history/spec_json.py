"""The JSON of a request in pieces of bounded size (`json_pieces`), as history and note store it.

Pure.
"""

from collections.abc import Iterator, Mapping

from jobworker.model.job import JobRecord, JobSpec
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_pieces import pieces
from jobworker.serialization.json_text import dumps


def spec_pieces(spec: JobSpec, summary: JobRecord) -> Iterator[str]:
    """Yield the JSON of a request in pieces.

    `summary`: the summary of the job's record. It names the parts of the request that may be long.
    """
    opening = "{"
    for name, short in unstructure(summary.spec).items():
        yield f"{opening}{dumps(name)}:"
        opening = ","
        value = getattr(spec, name)
        if name not in summary.abridged:
            yield dumps(short)
        elif isinstance(value, Mapping) or name == "command":
            yield from pieces(value, dumps)
        else:
            yield dumps(unstructure(value))
    yield "}"
