"""What was asked for of a job's end: told to the launcher with the signal, and kept there.

A service may be killed between a signal and the record of why it was sent, or while the disk takes
no record. So the request that sends the signal carries the cause and the time of the kill, and the
launcher keeps both beside the job, in the same turn of its loop. The next service goes by that: it
tells the same cause and keeps the same deadline.

The cause that came first stays, and the earliest kill. Times travel as durations: the launcher
counts them by its monotonic clock, which runs on while no service is there, and which nobody sets
back.

Standard library only.
"""

from typing import NamedTuple

STOP, TIMEOUT, OUTPUT = "stop", "timeout", "output"
CAUSES = frozenset({STOP, TIMEOUT, OUTPUT})


class Ask(NamedTuple):
    """Why a job is to end, and in how many milliseconds it is to be killed."""

    cause: str
    kill_in_ms: int


class AskedFor(NamedTuple):
    """What a service before this one has asked for of a job's end, as durations."""

    cause: str
    seconds_ago: float
    kill_in_seconds: float
    """Negative where that was due already."""
    signals: tuple[int, ...]
    """The signals that were sent for it."""


class Asked:
    """What the launcher keeps of the asks for the end of one job."""

    def __init__(self, ask: Ask, now: float) -> None:
        self.cause, self.first_at = ask.cause, now
        self._kill_at = now + ask.kill_in_ms / 1000
        self._signals = set[int]()

    def add(self, ask: Ask, number: int, now: float) -> None:
        """Keep that a signal was sent for an ask; of deadlines the earlier one."""
        self._kill_at = min(self._kill_at, now + ask.kill_in_ms / 1000)
        self._signals.add(number)

    def told(self, now: float) -> AskedFor:
        """What the next service has to know."""
        return AskedFor(
            cause=self.cause,
            seconds_ago=now - self.first_at,
            kill_in_seconds=self._kill_at - now,
            signals=tuple(sorted(self._signals)),
        )
