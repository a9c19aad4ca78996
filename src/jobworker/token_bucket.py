"""A token bucket: it allows a burst, and after it a bounded rate.

The caller passes the time; the bucket has no clock.
"""

from attrs import Factory, define


@define
class TokenBucket:
    """A bucket that begins full and refills by `per_second` tokens a second, up to `burst`."""

    filled_at: float
    burst: float
    per_second: float
    _tokens: float = Factory(lambda self: self.burst, takes_self=True)

    def take(self, now: float, count: int = 1) -> bool:
        """Take `count` tokens and return True; if there are fewer, take none and return False."""
        self._fill(now)
        if self._tokens < count:
            return False
        self._tokens -= count
        return True

    def draw(self, now: float, count: float) -> None:
        """Take `count` tokens even if there are fewer: the balance may become negative."""
        self._fill(now)
        self._tokens -= count

    def is_overdrawn(self, now: float) -> bool:
        """Whether the balance is negative."""
        self._fill(now)
        return self._tokens < 0

    def seconds_overdrawn(self, now: float) -> float:
        """Seconds until the balance is no longer negative; 0 if it is not."""
        self._fill(now)
        return max(0.0, -self._tokens / self.per_second)

    def is_full(self, now: float) -> bool:
        """Whether the bucket is full, so that a new one could replace it."""
        self._fill(now)
        return self._tokens >= self.burst

    def _fill(self, now: float) -> None:
        grown = self._tokens + (now - self.filled_at) * self.per_second
        self._tokens, self.filled_at = min(self.burst, grown), now
