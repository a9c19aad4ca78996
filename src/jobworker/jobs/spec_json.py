"""A request as JSON, in pieces of bounded size.

A request may have a megabyte of arguments and variables, and Python's encoder lets no other thread
or task run until it has all of it. So long parts are encoded in pieces: whoever joins them may let
others run between two. Pure.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from jobworker.convert import dumps, unstructure
from jobworker.model.job import JobRecord, JobSpec

PIECE_ENTRIES = 500
PIECE_CHARACTERS = 65_536
"""A piece ends with the entry that goes beyond: about a millisecond."""


def spec_pieces(spec: JobSpec, summary: JobRecord) -> Iterator[str]:
    """Pieces of the JSON of a request, given the summary of its record."""
    opening = "{"
    for name, short in unstructure(summary.spec).items():
        yield f"{opening}{dumps(name)}:"
        opening = ","
        value = getattr(spec, name)
        if name not in summary.abridged:
            yield dumps(short)
        elif isinstance(value, Mapping):
            yield from _pieces("{", (f"{dumps(k)}:{dumps(v)}" for k, v in value.items()), "}")
        elif name == "command":
            yield from _pieces("[", map(dumps, value), "]")
        else:
            yield dumps(unstructure(value))
    yield "}"


def _pieces(opening: str, entries: Iterable[str], closing: str) -> Iterator[str]:
    left = iter(entries)
    while piece := _next_piece(left):
        yield opening + ",".join(piece)
        opening = ","
    yield closing if opening == "," else opening + closing


def _next_piece(entries: Iterator[str]) -> list[str]:
    piece, size = list[str](), 0
    for each in islice(entries, PIECE_ENTRIES):
        piece.append(each)
        size += len(each)
        if size > PIECE_CHARACTERS:
            break
    return piece
