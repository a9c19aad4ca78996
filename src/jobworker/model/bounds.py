"""Validators for values, whose errors name the bounds and whose bounds can be documented.

Each validator has a `schema`: the same bounds in keywords of JSON Schema (2020-12). The protocol's
documents are generated from them, so each bound is stated once.
"""

from collections.abc import Callable, Mapping, Sized
from typing import Generic, TypeVar

from attrs import field, frozen

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


@frozen
class Documented(Generic[T_contra]):
    """A validator with the JSON Schema of its bounds."""

    _check: Callable[[object, object, T_contra], None]
    schema: Mapping[str, object] = field(hash=False)

    def __call__(self, instance: object, attribute: object, value: T_contra) -> None:
        """See attrs' validators."""
        self._check(instance, attribute, value)


def states(
    **schema: object,
) -> Callable[[Callable[[object, object, T], None]], Callable[[object, object, T], None]]:
    """A decorator: add to a validator the keywords of JSON Schema that express its bounds best."""

    def document(check: Callable[[object, object, T], None]) -> Callable[[object, object, T], None]:
        return Documented(check, schema)

    return document


def within(
    low: float, high: float, *, or_zero: bool = False
) -> Callable[[object, object, T], None]:
    """Make a validator for None and numbers from `low` to `high`; `or_zero` also allows 0."""
    words = f"0 (no limit) or from {low} to {high}" if or_zero else f"from {low} to {high}"
    bounds: dict[str, object] = {"minimum": low, "maximum": high}
    schema = {"anyOf": [{"const": 0}, bounds]} if or_zero and low > 0 else bounds

    def check(_: object, __: object, value: T) -> None:
        if not isinstance(value, int | float) or low <= value <= high or (or_zero and value == 0):
            return
        raise ValueError(f"must be {words}, not {value}")

    # mypy cannot infer that `Documented` accepts all that `check` accepts.
    return Documented(check, schema)  # type: ignore[return-value]


def at_most(count: int) -> Callable[[object, object, T], None]:
    """Make a validator for collections of at most `count` entries."""

    def check(_: object, __: object, value: T) -> None:
        if isinstance(value, Sized) and len(value) > count:
            raise ValueError(f"must have at most {count} entries, not {len(value)}")

    # mypy cannot infer that `Documented` accepts all that `check` accepts.
    return Documented(check, {"maxItems": count})  # type: ignore[return-value]
