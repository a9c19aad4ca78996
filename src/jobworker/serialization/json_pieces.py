"""Encode JSON in pieces of bounded size, so that other tasks and threads can run in between.

Python's encoder holds the interpreter's lock until the whole text is made: some ten milliseconds
for a megabyte of arguments and variables. The caller that joins the pieces may yield after each.
Pure, standard library only.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import TypeVar

T = TypeVar("T")
Encode = Callable[[object], str]

PIECE_ENTRIES = 500
PIECE_CHARACTERS = 65_536
"""A piece ends with the entry that exceeds this size: encoding it takes about a millisecond."""


def pieces(value: object, encode: Encode) -> Iterator[str]:
    """Yield the JSON text of `value` in pieces.

    `encode` returns the JSON of a part of the value, without white space. Nested lists and objects
    are walked here; entries that are neither go to `encode` in batches.
    """
    if isinstance(value, Mapping):
        entries = _batches(value.items(), lambda entry: entry[1])
        yield from _joined("{", (_members(batch, encode) for batch in entries), "}")
    elif isinstance(value, list | tuple):
        parts = (_items(batch, encode) for batch in _batches(value, lambda entry: entry))
        yield from _joined("[", parts, "]")
    else:
        yield encode(value)


def batches_of(variables: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the mapping in consecutive parts, each of at most about one piece."""
    for batch in _batches(variables.items(), lambda entry: entry[1]):
        yield dict(batch)


def _members(batch: list[tuple[str, object]], encode: Encode) -> Iterator[str]:
    name, value = batch[0]
    if _has_parts(value):
        return chain([f"{encode(name)}:"], pieces(value, encode))
    return iter([encode(dict(batch))[1:-1]])


def _items(batch: list[object], encode: Encode) -> Iterator[str]:
    return pieces(batch[0], encode) if _has_parts(batch[0]) else iter([encode(batch)[1:-1]])


def _joined(opening: str, parts: Iterable[Iterator[str]], closing: str) -> Iterator[str]:
    for part in parts:
        yield opening
        yield from part
        opening = ","
    yield closing if opening == "," else opening + closing


def _has_parts(value: object) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _batches(entries: Iterable[T], value_of: Callable[[T], object]) -> Iterator[list[T]]:
    """Yield batches of consecutive plain entries; a list or an object gets a batch of its own."""
    batch, size = list[T](), 0
    for entry in entries:
        value = value_of(entry)
        if type(value) is str:
            size += len(value)
        elif _has_parts(value):
            if batch:
                yield batch
            yield [entry]
            batch, size = [], 0
            continue
        batch.append(entry)
        if len(batch) >= PIECE_ENTRIES or size > PIECE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
