"""How often something may be measured: at any rate first, then by a share of a processor.

A job can give a reason to measure at any time, and what that takes is not counted as the job's. So
a measurement rests until it has used no more than `SHARE` of the time. The first `AT_ONCE_SECONDS`
are free, so that memory that is taken all of a sudden is followed closely. No rest is longer than
`LONGEST_REST_SECONDS`: who hoards is to be found meanwhile.

The caller passes the time, so that nothing here has a clock. Standard library only.
"""

SHARE = 0.1
AT_ONCE_SECONDS = 0.3
"""Some thirty measurements of a few jobs."""
LONGEST_REST_SECONDS = 1.0


class Pace:
    """What one measurement has used, less what it may use as time goes by."""

    def __init__(self) -> None:
        self._used_seconds = self._at = 0.0

    def rests(self, now: float) -> bool:
        """Whether it is not to begin again yet."""
        return self._used(now) > AT_ONCE_SECONDS

    def add(self, now: float, seconds: float) -> None:
        """It has used so much of a processor, up to now."""
        most = AT_ONCE_SECONDS + SHARE * LONGEST_REST_SECONDS
        self._used_seconds, self._at = min(self._used(now) + seconds, most), now

    def _used(self, now: float) -> float:
        return max(0.0, self._used_seconds - SHARE * (now - self._at))
