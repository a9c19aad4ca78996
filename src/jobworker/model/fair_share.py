"""Share a bounded number of places: the last tenth is reserved for names that have few places.

A name that fills all other places gets no more, and everybody else still gets one.
"""

KEPT_PART, FEW_PART = 10, 10
"""A tenth of the places is reserved. "Few" are fewer than a tenth of these."""


def may_take_one_more(size: int, *, taken: int, mine: int) -> bool:
    """Whether a name that has `mine` places may get one more, if `taken` of `size` are in use."""
    kept = size // KEPT_PART
    return taken < size - kept or (taken < size and mine < max(1, kept // FEW_PART))
