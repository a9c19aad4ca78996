"""The validator of a job's list of processor cores, such as "0-3,5" (`core_list`)."""

from jobworker.core_list import MAX_LENGTH, PATTERN, is_core_list, span_of
from jobworker.model.bounds import states

MAX_CORE = 8191


@states(pattern=f"^({PATTERN})?$", maxLength=MAX_LENGTH)
def check_cores(_: object, __: object, value: str) -> None:
    """A validator of attrs for "", which means all cores, or a list. Raises ValueError."""
    if not value:
        return
    if not is_core_list(value):
        raise ValueError(f"must be a list of cores such as 0-3,5, not {value[:80]!r}")
    for part in value.split(","):
        first, last = span_of(part)
        if last > MAX_CORE or last < first:
            raise ValueError(f"must be a list of cores such as 0-3,5: {part!r} is not allowed")
