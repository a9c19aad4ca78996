"""Who may have one more of a bounded number of places: the last tenth is for those who have few.

One that fills the rest is refused more, and everybody else still gets in.
"""

KEPT_PART, FEW_PART = 10, 10
"""A tenth of the places is kept, and a tenth of that is "few"."""


def has_room(size: int, *, taken: int, mine: int) -> bool:
    """Whether one who has `mine` of the places may have one more, where `taken` of `size` are."""
    kept = size // KEPT_PART
    return taken < size - kept or (taken < size and mine < max(1, kept // FEW_PART))
