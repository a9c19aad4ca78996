"""A list of processor cores, as cpuset(7) and taskset(1) write it: "0-3,5".

The service checks such a list in a request, and the launcher reads the same list to limit a job.
This module alone knows the form. It imports the standard library alone, so both can use it.
"""

import re

MAX_LENGTH = 1024
"""Characters of a list: far more than the ranges of all cores of a large host need."""

PATTERN = r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*"
"""A list that names at least one core, where \\d stands for the digits of ASCII."""


def is_core_list(text: str) -> bool:
    """Whether `text` has the form of a core list. A range in it may still be reversed ("3-1")."""
    return len(text) <= MAX_LENGTH and re.fullmatch(PATTERN, text, re.ASCII) is not None


def span_of(part: str) -> tuple[int, int]:
    """The first and the last core of one part of a list: "5" or "0-3". Raises ValueError."""
    first, dash, last = part.partition("-")
    return int(first), int(last if dash else first)


def parse_cores(text: str) -> frozenset[int]:
    """Return the cores of a list, the empty set for "". Raises ValueError.

    Overlapping ranges are merged first, so a core that the list repeats costs no time.
    """
    found: set[int] = set()
    beyond = 0
    for low, high in sorted(map(span_of, text.split(",") if text else ())):
        found.update(range(max(low, beyond), high + 1))
        beyond = max(beyond, high + 1)
    return frozenset(found)
