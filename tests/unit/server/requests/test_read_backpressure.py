"""What comes in on one connection, and when nothing is read."""

import trio
import trio.testing

from jobworker.server.fairness.fair_scheduling import Presence
from jobworker.server.fairness.slots import LARGE_BYTES, Slots
from jobworker.server.requests.read_backpressure import Intake


async def test_client_counts_as_not_read_until_the_last_reason_is_gone() -> None:
    """Else its answer to a ping, which nobody reads, would be missed."""
    intake = Intake(Slots(2, 2), "name", 60, Presence())
    async with trio.open_nursery() as nursery:
        with intake.pause():
            intake.begin()
            nursery.start_soon(intake.wait_for_room, 2 * LARGE_BYTES)
            await trio.testing.wait_all_tasks_blocked()
        assert intake.paused, "what came before is still being served"
        intake.end()
    assert not intake.paused
    assert intake.pauses == 3
