"""Wakes or cancels many tasks, a few in each turn of the event loop, so that others run in between.

Thousands of clients may wait for the end of one job. If all their tasks were woken at once, they
would all run in the next turn, which would take seconds.
"""

import logging
from collections.abc import Callable
from itertools import islice

import trio
from attrs import define, field

log = logging.getLogger("jobworker")

AT_A_TIME = 8
"""The number of tasks woken in one turn. Each does some 0.1 ms of work before it waits again."""


def run_in_batches(some: Callable[[], bool]) -> None:
    """Call `some` now and, as long as it returns True, again in the next turn of the loop.

    `some` must remove an item from its list before it does anything that may fail: after an
    unexpected fault it is called again for the rest. The fault is logged, since from here it would
    end the whole event loop.
    """
    try:
        again = some()
    except Exception:
        log.exception("an internal fault while tasks were woken")
        again = True
    if again:
        token = trio.lowlevel.current_trio_token()
        token.run_sync_soon(run_in_batches, some)


async def cancel_in_batches(scopes: set[trio.CancelScope]) -> None:
    """Cancel all scopes, a few in each turn of the loop, and empty the set.

    Shielded from cancellation: the tasks in these scopes have no other way to end.
    """
    with trio.CancelScope(shield=True):
        while some := tuple(islice(scopes, AT_A_TIME)):
            for scope in some:
                scope.cancel()
            scopes.difference_update(some)
            await trio.lowlevel.checkpoint()


@define(eq=False)
class BatchedEvent:
    """Like trio.Event, but it wakes the waiting tasks in batches."""

    _set: bool = field(default=False, init=False)
    _lot: trio.lowlevel.ParkingLot = field(factory=trio.lowlevel.ParkingLot, init=False)

    def is_set(self) -> bool:
        """Whether the event was set."""
        return self._set

    def set(self) -> None:
        """Set the event, and wake the tasks that wait for it, `AT_A_TIME` in each turn."""
        if not self._set:
            self._set = True
            run_in_batches(self._wake_some)

    def _wake_some(self) -> bool:
        self._lot.unpark(count=AT_A_TIME)
        return len(self._lot) > 0

    async def wait(self) -> None:
        """Wait until the event is set."""
        if self._set:
            await trio.lowlevel.checkpoint()
        else:
            await self._lot.park()
