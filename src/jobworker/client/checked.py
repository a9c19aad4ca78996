"""The parameters of a call, made of what a caller gave, by the rules that the server has.

Whatever is wrong with them is told as InvalidParams, with the path of the value, before anything is
sent. What Python has several forms for is taken in each: a sequence or another iterable, a member
of an enumeration or its value.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from jobworker.convert import faults_of, unstructure
from jobworker.errors import InvalidParams

T = TypeVar("T")


def checked(doing: str, cls: type[T], **values: object) -> T:
    """A `cls` of these values. Raises InvalidParams: "cannot DOING: path: what is wrong"."""
    try:
        plain = {name: _plain(value) for name, value in values.items()}
    except (TypeError, ValueError, AttributeError, OverflowError) as fault:
        raise InvalidParams(f"cannot {doing}: {fault}") from None
    made, faults = faults_of(cls, plain)
    if made is None or faults:
        raise InvalidParams(f"cannot {doing}: " + "; ".join(faults))
    return made


def _plain(value: object) -> object:
    """A value as it would come out of JSON; of what JSON has no form for, the value itself."""
    if isinstance(value, str | bytes | bytearray | int | float | None):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(content) for name, content in value.items()}
    if isinstance(value, Iterable):
        return [_plain(content) for content in value]
    simple = unstructure(value)
    return simple if simple is value else _plain(simple)
