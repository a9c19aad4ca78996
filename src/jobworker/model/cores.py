"""A list of processor cores, as cpuset(7) and taskset(1) write it: "0-3,5"."""

import re

from jobworker.model.bounds import states

MAX_CORE = 8191
MAX_CORES_LENGTH = 1024

_LIST = r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*"


@states(pattern=f"^({_LIST})?$", maxLength=MAX_CORES_LENGTH)
def check_cores(_: object, __: object, value: str) -> None:
    """A validator: "" for all cores, or a list of some; raises ValueError."""
    if not value:
        return
    if len(value) > MAX_CORES_LENGTH or not re.fullmatch(_LIST, value, re.ASCII):
        raise ValueError(f"must be a list of cores such as 0-3,5, not {value[:80]!r}")
    for part in value.split(","):
        first, last = f"{part}-{part}".split("-")[:2]
        if int(last or first) > MAX_CORE or int(last or first) < int(first):
            raise ValueError(f"must be a list of cores such as 0-3,5: {part!r} is none")
