"""A quota of waiting requests and subscriptions for each name, on all of its connections together.

One event, such as a job's end, may answer all of them at once, and each costs the service work.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from attrs import define, field

from jobworker.errors import Busy, TooManyRequests


@define(eq=False)
class WaitQuota:
    """Counts waiting requests and subscriptions by the client's name."""

    _most: int
    _counts: Counter[str] = field(factory=Counter, init=False)

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Count a waiting request while the block lasts. Raises TooManyRequests."""
        self.acquire(name, TooManyRequests)
        try:
            yield
        finally:
            self.release(name)

    def check(self, name: str, refusal: type[Busy]) -> None:
        """Raise `refusal` if `acquire` would."""
        if self._counts[name] >= self._most:
            raise refusal(
                f"cannot wait or follow: {name} does so {self._most} times already, on all of its "
                "connections",
                remedy="end some of these, or raise limits.max_waits",
            )

    def acquire(self, name: str, refusal: type[Busy]) -> None:
        """Count one more. Raises `refusal` if the name already has as many as it may have."""
        self.check(name, refusal)
        self._counts[name] += 1

    def release(self, name: str) -> None:
        """Count one fewer."""
        self._counts[name] -= 1
        if not self._counts[name]:
            del self._counts[name]
