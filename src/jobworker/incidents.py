"""Incidents: unexpected exceptions, each logged once under a number and counted.

An exception that no code expects must end nothing but its own unit of work: one connection, one
job, one run of a background task. The code at such a boundary records it here. The client or the
job's record gets the incident's number; the log has the traceback beside the same number.

No client can repeat a background task (retention, the audit, reloads, warnings) that has failed. So
`keep_running` restarts it after a pause, which doubles at each failure (exponential backoff).
"""

import logging
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn

import trio
from attrs import define, field

from jobworker.errors import JobworkerError

log = logging.getLogger("jobworker")

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
"""The upper bound of the backoff. A run that lasts longer resets the pause to the first one."""


@define(eq=False)
class Incidents:
    """The incidents of one service, counted by kind."""

    _counts: Counter[str] = field(factory=Counter, init=False)

    def record(self, struck: str, what: str = "") -> str:
        """Log and count the exception that is being handled. Returns the incident's number.

        `struck` is the kind of work that it ended: "connection", "job", or a task's name. `what`
        names the one that ended, for the log.
        """
        number = secrets.token_hex(4)
        self._counts[struck] += 1
        log.exception("incident %s: %s", number, what or struck)
        return number

    def statistics(self) -> Mapping[str, int]:
        """The number of incidents of each kind since the service started."""
        return dict(self._counts)

    async def keep_running(self, name: str, task: Callable[[], Awaitable[object]]) -> NoReturn:
        """Run a background task for ever: log and count an exception, pause, and run it again.

        Only cancellation ends it.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            began = trio.current_time()
            try:
                await task()
            except* JobworkerError as group:  # expected: it needs no traceback
                self._counts[name] += 1
                log.error("%s: %s", name, "; ".join(map(str, _leaves(group))))
            except* Exception:  # noqa: BLE001 - recorded
                self.record(name)
            if trio.current_time() - began > LONGEST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _leaves(group: BaseExceptionGroup[JobworkerError]) -> list[JobworkerError]:
    """The errors of an exception group and of all groups nested in it."""
    found: list[JobworkerError] = []
    for each in group.exceptions:
        found += _leaves(each) if isinstance(each, BaseExceptionGroup) else [each]
    return found
