"""The jobs that are being removed by force at this moment.

A removal by force takes the output away from its followers. Their subscriptions look here, and tell
the clients that the job was removed. Several callers may remove one job at a time: it stays here
until the last of them has finished or failed.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from attrs import define, field

from jobworker.model.job import JobId


@define(eq=False)
class Removals:
    """The jobs that are being removed by force."""

    _callers: Counter[JobId] = field(factory=Counter, init=False)

    def __contains__(self, job: JobId) -> bool:
        return job in self._callers

    @contextmanager
    def marked(self, job: JobId) -> Iterator[None]:
        """Count a job as being removed during the block."""
        self._callers[job] += 1
        try:
            yield
        finally:
            self._callers[job] -= 1
            if not self._callers[job]:
                del self._callers[job]
