"""What comes in on one connection, and when nothing is read."""

import trio
import trio.testing

from jobworker.server.fairness.fair_scheduling import ActiveClients
from jobworker.server.fairness.slots import LARGE_BYTES, Slots
from jobworker.server.requests.read_backpressure import ReadBackpressure


async def test_client_counts_as_not_read_until_the_last_reason_is_gone() -> None:
    """Else its answer to a ping, which nobody reads, would be missed."""
    backpressure = ReadBackpressure(Slots(2, 2), "name", 60, ActiveClients())
    async with trio.open_nursery() as nursery:
        with backpressure.pause():
            backpressure.begin()
            nursery.start_soon(backpressure.wait_for_room, 2 * LARGE_BYTES)
            await trio.testing.wait_all_tasks_blocked()
        assert backpressure.paused, "what came before is still being served"
        backpressure.end()
    assert not backpressure.paused
    assert backpressure.pauses == 3
