"""End requests: cause and deadline of a job's end, sent with the signal and kept by the launcher.

A service may be killed after it sent a signal and before it recorded why, or while the disk takes
no record. So the request that sends the signal carries the cause and the time of the kill. The
launcher keeps both beside the job, in the same turn of its loop. The next service reports the same
cause and keeps the same deadline.

The first cause stays, and so does the earliest kill. Times are sent as durations. The launcher
measures them by its monotonic clock, which runs on while no service is there and is never set back.

Standard library only.
"""

from typing import NamedTuple

STOP, TIMEOUT, OUTPUT = "stop", "timeout", "output"
CAUSES = frozenset({STOP, TIMEOUT, OUTPUT})


class EndRequest(NamedTuple):
    """Why a job has to end, and in how many milliseconds it is killed."""

    cause: str
    kill_in_ms: int


class EndRequestReport(NamedTuple):
    """An earlier service's end request, with times as durations."""

    cause: str
    seconds_ago: float
    kill_in_seconds: float
    """Negative if the kill is overdue."""
    signals: tuple[int, ...]
    """The signals that were sent for it."""


class EndRequestLog:
    """The launcher's state of the end requests of one job."""

    def __init__(self, request: EndRequest, now: float) -> None:
        self.cause, self.first_at = request.cause, now
        self._kill_at = now + request.kill_in_ms / 1000
        self._signals = set[int]()

    def add(self, request: EndRequest, number: int, now: float) -> None:
        """Record a signal that was sent for an end request; the earlier deadline stays."""
        self._kill_at = min(self._kill_at, now + request.kill_in_ms / 1000)
        self._signals.add(number)

    def report(self, now: float) -> EndRequestReport:
        """The state at `now`, for the next service."""
        return EndRequestReport(
            cause=self.cause,
            seconds_ago=now - self.first_at,
            kill_in_seconds=self._kill_at - now,
            signals=tuple(sorted(self._signals)),
        )
