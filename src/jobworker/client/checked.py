"""Make the parameters of a call from a caller's Python values, by the rules of the server.

An invalid value is InvalidParams, with the path of the value, before anything is sent. Any iterable
is accepted as a list, and a member of an enumeration or its value.
"""

from typing import TypeVar

from jobworker.errors import InvalidParams
from jobworker.serialization.convert import as_plain, faults_of
from jobworker.serialization.exact import kind

T = TypeVar("T")


def check_callback(doing: str, name: str, value: object) -> None:
    """Raise InvalidParams for a value that is neither None nor callable."""
    if value is not None and not callable(value):
        raise InvalidParams(f"cannot {doing}: {name}: must be a function, not {kind(value)}")


def checked(doing: str, cls: type[T], **values: object) -> T:
    """Make a `cls` from values. Raises InvalidParams: "cannot DOING: path: problem"."""
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
