"""For attrs classes that callers of the Python API construct: an invalid value is InvalidParams."""

import copy
from collections.abc import Callable
from enum import Enum
from functools import wraps
from types import UnionType
from typing import Literal, TypeVar, Union, cast, get_args, get_origin

import attrs
from attrs import AttrsInstance

from jobworker.errors import InvalidParams
from jobworker.serialization.convert import faults_of_fields

T = TypeVar("T")


def raises_invalid_params(cls: type[T]) -> type[T]:
    """Make a keyword-only attrs class raise InvalidParams, which names each invalid value."""
    make = cast("Callable[..., None]", cls.__init__)
    takes = _checked_fields(cls)

    @wraps(make)
    def init(self: T, *args: object, **values: object) -> None:
        if args:
            raise InvalidParams(f"cannot make a {cls.__name__}: give its values by name")
        try:
            for name, (kinds, choices) in takes.items():
                if name not in values:
                    continue
                value = values[name]
                if isinstance(value, Enum) and type(value) not in kinds:
                    value = values[name] = value.value
                if type(value) not in kinds or (choices and value not in choices):
                    raise TypeError(f"{name}: cannot be made of a {type(value).__name__}")
            make(self, **values)
        except InvalidParams:
            raise
        except Exception as fault:  # noqa: BLE001 - a validator may raise anything on a wrong type
            why = "; ".join(faults_of_fields(cls, values)) or str(fault)
            raise InvalidParams(f"cannot make a {cls.__name__}: {why}") from None

    cls.__init__ = init  # type: ignore[method-assign, assignment]
    return cls


def _checked_fields(cls: type) -> dict[str, tuple[set[type], set[object]]]:
    """For each field of a single text, number, boolean or attrs object: the types that it accepts,
    and the values if it is an enumeration.

    The constructor checks these first, because not all fields have a validator, and those of
    numbers accept values that are not numbers.
    """
    found = {}
    for each in attrs.fields(cast("type[AttrsInstance]", cls)):
        union = get_origin(each.type) in (Union, UnionType)
        parts = get_args(each.type) if union else (each.type,)
        literals = [part for part in parts if get_origin(part) is Literal]
        classes = {part for part in parts if isinstance(part, type)}
        if len(literals) + len(classes) < len(parts):
            continue
        choices = {value for literal in literals for value in get_args(literal)}
        kinds = classes | set(map(type, choices))
        if choices and type(None) in kinds:
            choices.add(None)
        if float in kinds:
            kinds.add(int)
        found[each.name] = kinds, choices
    return found


def evolve_unchecked(made: T, **changes: object) -> T:
    """Return a copy with other values, which the caller guarantees to be valid.

    `attrs.evolve` would run every validator again, over a request of up to a megabyte.
    """
    new = copy.copy(made)
    for name, value in changes.items():
        object.__setattr__(new, name, value)
    return new
