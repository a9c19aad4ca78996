"""JSON in pieces of bounded size: Python's encoder lets nobody else run until it has all of it.

A megabyte of arguments and variables takes it some ten milliseconds. Whoever joins the pieces may
let others run between two. Pure, and of the standard library alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import TypeVar

T = TypeVar("T")
Encode = Callable[[object], str]

PIECE_ENTRIES = 500
PIECE_CHARACTERS = 65_536
"""A piece ends with the entry that goes beyond: about a millisecond."""


def pieces(value: object, encode: Encode) -> Iterator[str]:
    """Pieces of the JSON of `value`; `encode` makes that of a part of it, without white space.

    Lists and objects are taken apart, and what they hold that is neither is encoded many at a time.
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
    """Consecutive parts of a mapping, of which none takes long to encode."""
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
    """Consecutive entries, none of them with parts; or one that has, alone."""
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
