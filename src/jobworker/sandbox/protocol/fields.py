"""Fields of messages between service and launcher: how each is read, checked and written.

A message is a JSON object, and a record is the named tuple that stands for it. A `Field` connects
one value of the record with the members of the object that carry it: mostly one member, but an
order for a job takes eleven. `decode` makes a record of a message, `encode` a message of a record.

A field accepts any value that the other side sends; if the value does not fit, it raises Malformed,
which names the field. The code that decodes a whole message adds the message's name.

Pure, standard library only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Never, TypeVar, cast

Object = Mapping[str, object]
R = TypeVar("R", bound=tuple[object, ...])
Read = Callable[[Object], object]
Check = Callable[[object, str], object]
"""Checks a member's value and returns it as the record holds it. It gets the member's name, too,
for Malformed."""


class Malformed(Exception):
    """A message does not fit the table; the text names the field and its fault."""


class Field(NamedTuple):
    """One value of a record, and the members of a message that carry it."""

    names: tuple[str, ...]
    read: Read
    write: Callable[[Never], Object]
    """Gets the record's value. Only the row of the table knows its type, hence Never."""


Fields = tuple[Field, ...]


def decode(record: type[R], fields: Fields, message: Object) -> R:
    """The record in a message. Raises Malformed."""
    make = cast("Callable[..., R]", record)
    return make(*(field.read(message) for field in fields))


def encode(fields: Fields, record: tuple[object, ...]) -> dict[str, object]:
    """The members of a record's message, in the order of the fields."""
    message: dict[str, object] = {}
    for field, value in zip(fields, record, strict=True):
        write = cast("Callable[[object], Object]", field.write)
        message.update(write(value))
    return message


# --- kinds of fields ----------------------------------------------------------------------------


def member(name: str, check: Check) -> Field:
    """A value in one member, which must pass `check`."""
    return Field(
        (name,), lambda message: check(message.get(name), name), lambda value: {name: value}
    )


def optional(field: Field, default: object) -> Field:
    """As `field`, or `default` if the message has none of its members.

    Use it if the other side may be of an earlier version, which does not send them.
    """

    def read(message: Object) -> object:
        return field.read(message) if any(n in message for n in field.names) else default

    return field._replace(read=read)


def integer(name: str, low: int, high: int) -> Field:
    """An integer from `low` to `high`."""
    return member(name, lambda value, name: as_integer(value, name, low, high))


def count(name: str) -> Field:
    """An integer of any size."""
    return member(name, as_count)


def count_or_null(name: str) -> Field:
    """An integer of any size, or None for a null. An absent member is malformed."""

    def read(message: Object) -> int | None:
        return as_count(message.get(name), name) if message.get(name, "") is not None else None

    return Field((name,), read, lambda value: {name: value})


def seconds(name: str) -> Field:
    """A finite number of seconds."""
    return member(name, as_seconds)


def text(name: str) -> Field:
    """A text of any length."""
    return member(name, as_text)


def flag(name: str) -> Field:
    """True or false."""
    return member(name, as_flag)


def many(name: str, check: Check) -> Field:
    """A list of values, each of which must pass `check`; the record holds a tuple."""

    def read(message: Object) -> tuple[object, ...]:
        return tuple(check(each, name) for each in as_list(message.get(name), name))

    def write(value: Sequence[object]) -> Object:
        return {name: list(value)}

    return Field((name,), read, write)


def flat(record: type[R], fields: Fields) -> Field:
    """A record inside another; its members are members of the message itself."""
    names = tuple(name for field in fields for name in field.names)
    return Field(
        names, lambda message: decode(record, fields, message), lambda v: encode(fields, v)
    )


def nested(name: str, record: type[R], fields: Fields) -> Field:
    """A record inside another; its members are in an object of their own."""

    def read(message: Object) -> R:
        return decode(record, fields, as_object(message.get(name), name))

    return Field((name,), read, lambda value: {name: encode(fields, value)})


def nested_or_null(name: str, record: type[R], fields: Fields) -> Field:
    """As `nested`, or None for a null. An absent member is malformed."""
    inner = nested(name, record, fields)

    def read(message: Object) -> object:
        return inner.read(message) if message.get(name, "") is not None else None

    def write(value: R | None) -> Object:
        return {name: None if value is None else encode(fields, value)}

    return Field((name,), read, write)


def several(name: str, record: type[R], fields: Fields) -> Field:
    """A list of records; the outer record holds a tuple."""

    def read(message: Object) -> tuple[R, ...]:
        entries = as_list(message.get(name), name)
        return tuple(decode(record, fields, as_object(entry, name)) for entry in entries)

    def write(value: Sequence[R]) -> Object:
        return {name: [encode(fields, entry) for entry in value]}

    return Field((name,), read, write)


# --- checks of one value ------------------------------------------------------------------------


def as_integer(value: object, name: str, low: int, high: int) -> int:
    """An integer from `low` to `high`; True and 1.0 are no integers here."""
    if type(value) is not int or not low <= value <= high:
        raise Malformed(f"{name} is no integer from {low} to {high}")
    return value


def as_count(value: object, name: str) -> int:
    """An integer of any size."""
    if type(value) is not int:
        raise Malformed(f"{name} is no integer")
    return value


def as_seconds(value: object, name: str) -> float:
    """A finite number; an integer that is larger than all floats is malformed."""
    try:
        if type(value) in (int, float) and math.isfinite(cast("float", value)):
            return cast("float", value)
    except OverflowError:
        pass
    raise Malformed(f"{name} is no finite number")


def as_text(value: object, name: str) -> str:
    """A text of any length."""
    if type(value) is not str:
        raise Malformed(f"{name} is no text")
    return value


def as_flag(value: object, name: str) -> bool:
    """True or false; 0 and 1 are neither."""
    if type(value) is not bool:
        raise Malformed(f"{name} is neither true nor false")
    return value


def as_list(value: object, name: str) -> list[object]:
    """A list of anything."""
    if type(value) is not list:
        raise Malformed(f"{name} is no list")
    return value


def as_object(value: object, name: str) -> dict[str, object]:
    """An object with any members."""
    if type(value) is not dict:
        raise Malformed(f"{name} is no object")
    return value
