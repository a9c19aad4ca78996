"""A request as JSON, in pieces of bounded size (`json_pieces`). Pure."""

from collections.abc import Iterator, Mapping

from jobworker.model.job import JobRecord, JobSpec
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_pieces import pieces
from jobworker.serialization.json_text import dumps


def spec_pieces(spec: JobSpec, summary: JobRecord) -> Iterator[str]:
    """Pieces of the JSON of a request, given the summary of its record."""
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
