"""Counters of events since the service started, for a metrics exporter.

A counter has a name and a label (the name of an error, say), and only grows. The counters stand
here and not in an exporter's library, so the code that counts does not depend on an exporter.
"""

from collections import Counter
from collections.abc import Mapping

from attrs import define, field

LIMITS_REACHED = "limits_reached"
"""Limits that were reached; the label is the name of the limit's error."""
CONNECTIONS = "connections"
"""Connections that were opened."""
HANDSHAKES_FAILED = "handshakes_failed"
"""Handshakes that ended before the connection was open, whatever the reason."""


@define(eq=False)
class Counters:
    """The counters of one service."""

    _counts: Counter[tuple[str, str]] = field(factory=Counter, init=False)

    def add(self, name: str, label: str = "", count: int = 1) -> None:
        """Add `count` to a counter."""
        self._counts[name, label] += count

    def value(self, name: str, label: str = "") -> int:
        """The value of one counter; 0 if it was never counted."""
        return self._counts[name, label]

    def statistics(self) -> Mapping[tuple[str, str], int]:
        """A copy of all counters, by name and label."""
        return dict(self._counts)
