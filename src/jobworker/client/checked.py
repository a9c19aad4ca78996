"""The parameters of a call, made of what a caller gave, by the rules that the server has.

Whatever is wrong with them is told as InvalidParams, with the path of the value, before anything is
sent. What Python has several forms for is taken in each: a sequence or another iterable, a member
of an enumeration or its value.
"""

from typing import TypeVar

from jobworker.convert import as_plain, faults_of
from jobworker.errors import InvalidParams
from jobworker.exact import kind

T = TypeVar("T")


def check_callback(doing: str, name: str, value: object) -> None:
    """Raise InvalidParams for what is neither None nor to be called."""
    if value is not None and not callable(value):
        raise InvalidParams(f"cannot {doing}: {name}: must be a function, not {kind(value)}")


def checked(doing: str, cls: type[T], **values: object) -> T:
    """A `cls` of these values. Raises InvalidParams: "cannot DOING: path: what is wrong"."""
    plain = {}
    for name, value in values.items():
        try:
            plain[name] = as_plain(value)
        except ValueError as fault:
            raise InvalidParams(f"cannot {doing}: {name}: {fault}") from None
    made, faults = faults_of(cls, plain)
    if made is None or faults:
        raise InvalidParams(f"cannot {doing}: " + "; ".join(faults))
    return made
