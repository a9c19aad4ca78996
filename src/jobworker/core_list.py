"""A list of processor cores, as cpuset(7) and taskset(1) write it: "0-3,5".

The service checks such a list in a request, and root's side reads the same list where it limits a
job. This module is the one place that knows the form, and it imports the standard library alone, so
both sides can have it.
"""

import re

MAX_LENGTH = 1024
"""Characters of a list: far above one that names each core of a large host by ranges."""

PATTERN = r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*"
"""A list that names at least one core, where \\d stands for the digits of ASCII."""


def is_core_list(text: str) -> bool:
    """Whether `text` has the form of a list; a range in it may still end before it begins."""
    return len(text) <= MAX_LENGTH and re.fullmatch(PATTERN, text, re.ASCII) is not None


def span_of(part: str) -> tuple[int, int]:
    """The first and the last core of one part of a list: "5" or "0-3". Raises ValueError."""
    first, dash, last = part.partition("-")
    return int(first), int(last if dash else first)


def parse_cores(text: str) -> frozenset[int]:
    """The cores of a list, none for ""; raises ValueError.

    Each core is counted once, however often the list has it: ranges that overlap are joined first.
    """
    found: set[int] = set()
    beyond = 0
    for low, high in sorted(map(span_of, text.split(",") if text else ())):
        found.update(range(max(low, beyond), high + 1))
        beyond = max(beyond, high + 1)
    return frozenset(found)
