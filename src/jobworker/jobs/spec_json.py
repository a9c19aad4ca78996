"""A request as JSON, in pieces of bounded size.

A request may have a megabyte of arguments and variables, and Python's encoder lets no other thread
or task run until it has all of it. So long parts are encoded in pieces: whoever joins them may let
others run between two. Pure.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from jobworker.convert import dumps, unstructure
from jobworker.model.job import JobRecord, JobSpec

T = TypeVar("T")

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
            yield from _joined("{", map(dumps, batches_of(value)), "}")
        elif name == "command":
            yield from _joined("[", (dumps(batch) for batch in _batches(value, len)), "]")
        else:
            yield dumps(unstructure(value))
    yield "}"


def batches_of(variables: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Consecutive parts of a mapping, of which none takes long to encode."""
    for batch in _batches(variables.items(), lambda entry: len(entry[0]) + len(entry[1])):
        yield dict(batch)


def _joined(opening: str, pieces: Iterable[str], closing: str) -> Iterator[str]:
    """One list or object of several: each piece without its own brackets."""
    for piece in pieces:
        yield opening + piece[1:-1]
        opening = ","
    yield closing if opening == "," else opening + closing


def _batches(entries: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    batch, size = list[T](), 0
    for each in entries:
        batch.append(each)
        size += length(each)
        if len(batch) >= PIECE_ENTRIES or size > PIECE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
