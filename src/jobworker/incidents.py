"""Incidents: unexpected faults, each told once in the log under a number, counted, and outlived.

A fault that no code foresaw must end no more than what it struck: one connection, one job, one
turn of a background task. Whoever stands at such a boundary records the fault here. The client or
the job's record gets the incident's number, and the log has the traceback beside the same number.

A background task (retention, the audit, reloads, warnings) belongs to nobody who could ask for it
again. So `keep_running` starts it anew after a pause, which doubles while it keeps failing.
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
"""A task that fails at once, each time, is tried this seldom in the end."""


@define(eq=False)
class Incidents:
    """The incidents of one service, by what they struck."""

    _counts: Counter[str] = field(factory=Counter, init=False)

    def record(self, struck: str, what: str = "") -> str:
        """Log and count the exception that is being handled. Returns the incident's number.

        `struck` is the kind of thing that it ended ("connection", "job", a task's name), `what`
        the one of them.
        """
        number = secrets.token_hex(4)
        self._counts[struck] += 1
        log.exception("incident %s: %s", number, what or struck)
        return number

    def statistics(self) -> Mapping[str, int]:
        """How many there were of each kind since the service started."""
        return dict(self._counts)

    async def keep_running(self, name: str, task: Callable[[], Awaitable[object]]) -> NoReturn:
        """Run a background task for ever: an exception of it is counted, and starts it anew.

        Cancellation ends it, as it ends any task.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            began = trio.current_time()
            try:
                await task()
            except* JobworkerError as group:  # foreseen: it needs no traceback
                self._counts[name] += 1
                log.error("%s: %s", name, "; ".join(map(str, _leaves(group))))
            except* Exception:  # noqa: BLE001 - recorded
                self.record(name)
            if trio.current_time() - began > LONGEST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _leaves(group: BaseExceptionGroup[JobworkerError]) -> list[JobworkerError]:
    """The errors of a group, whatever groups they stand in."""
    found: list[JobworkerError] = []
    for each in group.exceptions:
        found += _leaves(each) if isinstance(each, BaseExceptionGroup) else [each]
    return found
