"""Classes that callers of the Python API make: what is wrong with a value is InvalidParams."""

import copy
from collections.abc import Callable
from functools import wraps
from typing import TypeVar, cast

import attrs
from attrs import AttrsInstance

from jobworker.errors import InvalidParams

T = TypeVar("T")


def told(cls: type[T]) -> type[T]:
    """Have a class of attrs, with keywords alone, raise InvalidParams that names the value."""
    make = cast("Callable[..., None]", cls.__init__)

    @wraps(make)
    def init(self: T, *args: object, **values: object) -> None:
        try:
            make(self, *args, **values)
        except InvalidParams:
            raise
        except (TypeError, ValueError, AttributeError) as fault:
            path = _culprit(cls, values)
            why = f"{path}: {fault}" if path else str(fault)
            raise InvalidParams(f"cannot make a {cls.__name__}: {why}") from None

    cls.__init__ = init  # type: ignore[method-assign, assignment]
    return cls


def altered(made: T, **changes: object) -> T:
    """A copy with other values, which are sound: nothing is checked again.

    `attrs.evolve` has every validator run, and a request may have a megabyte to look through.
    """
    new = copy.copy(made)
    for name, value in changes.items():
        object.__setattr__(new, name, value)
    return new


def _culprit(cls: type, values: dict[str, object]) -> str:
    """The first value that its validator refuses, by name; "" where it is none of them."""
    for attribute in attrs.fields(cast("type[AttrsInstance]", cls)):
        if attribute.validator is not None and attribute.name in values:
            try:
                attribute.validator(None, attribute, values[attribute.name])
            except (TypeError, ValueError, AttributeError):
                return str(attribute.name)
    return ""
