"""A rate limit for measurements: a leaky bucket of processor time.

A job can cause measurements at any time, and their processor time is not charged to the job. So a
measurement rests until it has used no more than `SHARE` of the time. The first `AT_ONCE_SECONDS`
are free, so that measurements closely follow memory that a job takes suddenly. No rest is longer
than `LONGEST_REST_SECONDS`, since a job that hoards memory must be found in that time.

The caller passes the time, so that nothing here has a clock. Standard library only.
"""

SHARE = 0.1
AT_ONCE_SECONDS = 0.3
"""Processor time for some thirty measurements of a few jobs."""
LONGEST_REST_SECONDS = 1.0


class CpuBudget:
    """The processor time that one measurement has used, less its share of the time since then."""

    def __init__(self) -> None:
        self._used_seconds = self._at = 0.0

    def is_overdrawn(self, now: float) -> bool:
        """Whether the measurement must not begin again yet."""
        return self._used(now) > AT_ONCE_SECONDS

    def charge(self, now: float, seconds: float) -> None:
        """Record that the measurement has used so many seconds of processor time up to `now`."""
        most = AT_ONCE_SECONDS + SHARE * LONGEST_REST_SECONDS
        self._used_seconds, self._at = min(self._used(now) + seconds, most), now

    def _used(self, now: float) -> float:
        return max(0.0, self._used_seconds - SHARE * (now - self._at))
