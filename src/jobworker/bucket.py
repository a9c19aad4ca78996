"""A token bucket: how much of something may still come, after a burst, at a bounded rate.

The caller passes the time, so that nothing here has a clock.
"""

from attrs import Factory, define


@define
class Bucket:
    """Full at first; fills again by `per_second`, up to `burst`."""

    filled_at: float
    burst: float
    per_second: float
    _tokens: float = Factory(lambda self: self.burst, takes_self=True)

    def take(self, now: float, count: int = 1) -> bool:
        """Take so many tokens; returns False, and takes none, where there are fewer."""
        self._fill(now)
        if self._tokens < count:
            return False
        self._tokens -= count
        return True

    def draw(self, now: float, count: float) -> None:
        """Take so many tokens, whether there are as many or not."""
        self._fill(now)
        self._tokens -= count

    def is_overdrawn(self, now: float) -> bool:
        """Whether more was drawn than there was, and has not been filled again."""
        self._fill(now)
        return self._tokens < 0

    def seconds_overdrawn(self, now: float) -> float:
        """How long it takes until as much is filled again as was drawn too much."""
        self._fill(now)
        return max(0.0, -self._tokens / self.per_second)

    def is_full(self, now: float) -> bool:
        """Whether it is as good as a new one."""
        self._fill(now)
        return self._tokens >= self.burst

    def _fill(self, now: float) -> None:
        grown = self._tokens + (now - self.filled_at) * self.per_second
        self._tokens, self.filled_at = min(self.burst, grown), now
