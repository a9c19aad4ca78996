"""Classes that callers of the Python API make: what is wrong with a value is InvalidParams."""

import copy
from collections.abc import Callable
from functools import wraps
from types import UnionType
from typing import Literal, TypeVar, cast, get_args, get_origin

import attrs
from attrs import AttrsInstance

from jobworker.convert import faults_of_fields
from jobworker.errors import InvalidParams

T = TypeVar("T")


def told(cls: type[T]) -> type[T]:
    """Have a class of attrs, with keywords alone, raise InvalidParams that names the value."""
    make = cast("Callable[..., None]", cls.__init__)
    simple = _simple_fields(cls)

    @wraps(make)
    def init(self: T, *args: object, **values: object) -> None:
        if args:
            raise InvalidParams(f"cannot make a {cls.__name__}: give its values by name")
        try:
            for name, kinds in simple.items():
                if name in values and type(values[name]) not in kinds:
                    raise TypeError(f"{name} is of a wrong type")
            make(self, **values)
        except InvalidParams:
            raise
        except Exception as fault:  # noqa: BLE001 - as any validator fails over a wrong type
            why = "; ".join(faults_of_fields(cls, values)) or str(fault)
            raise InvalidParams(f"cannot make a {cls.__name__}: {why}") from None

    cls.__init__ = init  # type: ignore[method-assign, assignment]
    return cls


def _simple_fields(cls: type) -> dict[str, set[type]]:
    """The fields that hold one text, number or boolean, and the types that each takes.

    Looked at before all else: validators of numbers pass over what is none.
    """
    found = {}
    for each in attrs.fields(cast("type[AttrsInstance]", cls)):
        origin, parts = get_origin(each.type), get_args(each.type)
        if origin is Literal:
            kinds = {type(value) for value in parts}
        elif origin is None or origin is UnionType:
            kinds = set(parts) or {cast("type", each.type)}
        else:
            continue
        if float in kinds:
            kinds.add(int)
        if kinds <= {str, int, float, bool, type(None)}:
            found[each.name] = kinds
    return found


def altered(made: T, **changes: object) -> T:
    """A copy with other values, which are sound: nothing is checked again.

    `attrs.evolve` has every validator run, and a request may have a megabyte to look through.
    """
    new = copy.copy(made)
    for name, value in changes.items():
        object.__setattr__(new, name, value)
    return new
