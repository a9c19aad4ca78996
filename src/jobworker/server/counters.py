"""Counters: how often what happened since the service started, for whoever exports them.

A counter has a name and a label (the name of an error, say); it only grows. Kept here and not in
an exporter's library, so that what counts need not know who reads.
"""

from collections import Counter
from collections.abc import Mapping

from attrs import define, field

LIMITS_REACHED = "limits_reached"
"""By the name of the error that tells of the limit."""
CONNECTIONS = "connections"
"""Those that were opened."""
HANDSHAKES_FAILED = "handshakes_failed"
"""Those that ended before a connection was open, whatever the reason."""


@define(eq=False)
class Counters:
    """Of one service."""

    _counts: Counter[tuple[str, str]] = field(factory=Counter, init=False)

    def add(self, name: str, label: str = "", count: int = 1) -> None:
        """Count something that has happened."""
        self._counts[name, label] += count

    def value(self, name: str, label: str = "") -> int:
        """How often it has happened."""
        return self._counts[name, label]

    def statistics(self) -> Mapping[tuple[str, str], int]:
        """All of them, by name and label."""
        return dict(self._counts)
