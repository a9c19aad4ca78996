"""Wakes or cancels many tasks a few at a time: others get their turns of the event loop in between.

Thousands of clients may wait for the end of one job. Woken at once, all of them do their work in
one turn, for seconds.
"""

import logging
from collections.abc import Callable
from itertools import islice

import trio
from attrs import define, field

log = logging.getLogger("jobworker")

AT_A_TIME = 8
"""Each does some 0.1 ms of work before it waits again."""


def run_in_batches(some: Callable[[], bool]) -> None:
    """Call `some` now and, as long as it returns True, in the loop's next turn again.

    Each call takes away from what is to be done before it does anything that may fail: so after an
    unexpected fault, which would end the whole event loop from here, the rest is done all the same.
    """
    try:
        again = some()
    except Exception:
        log.exception("an internal fault while others were woken")
        again = True
    if again:
        token = trio.lowlevel.current_trio_token()
        token.run_sync_soon(run_in_batches, some)


async def cancel_in_batches(scopes: set[trio.CancelScope]) -> None:
    """Cancel all of them, a few in each turn of the loop, and leave the set empty.

    That is never cut short: those who wait for them have no other way out.
    """
    with trio.CancelScope(shield=True):
        while some := tuple(islice(scopes, AT_A_TIME)):
            for scope in some:
                scope.cancel()
            scopes.difference_update(some)
            await trio.lowlevel.checkpoint()


@define(eq=False)
class BatchedEvent:
    """Like trio.Event."""

    _set: bool = field(default=False, init=False)
    _lot: trio.lowlevel.ParkingLot = field(factory=trio.lowlevel.ParkingLot, init=False)

    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._set

    def set(self) -> None:
        """It has happened."""
        if not self._set:
            self._set = True
            run_in_batches(self._wake_some)

    def _wake_some(self) -> bool:
        self._lot.unpark(count=AT_A_TIME)
        return len(self._lot) > 0

    async def wait(self) -> None:
        """Wait until it has happened."""
        if self._set:
            await trio.lowlevel.checkpoint()
        else:
            await self._lot.park()
