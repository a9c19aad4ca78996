"""A conversation ends if its client is too slow."""

from types import SimpleNamespace
from typing import cast

import pytest
import trio

from jobworker.errors import JobworkerError, SendStalled
from jobworker.server.connections.framed_socket import FramedSocket
from jobworker.server.fairness.slots import LOOK_SECONDS, Slots
from jobworker.server.requests.watches import end_unless_taken

NAME, STALL_SECONDS = "alice", 5.0


@pytest.mark.parametrize("is_wanted", [False, True])
async def test_who_takes_a_large_reply_slowly_is_let_go_once_somebody_waits(
    autojump_clock: object, is_wanted: bool
) -> None:
    """Else it would ask again, for as long as it lives, for what it cannot take in time."""
    slots, faults = Slots(in_all=1, for_each=1), list[JobworkerError]()
    assert slots.acquire_nowait(NAME)

    async def watch() -> None:
        socket = cast(FramedSocket, SimpleNamespace(taken_bytes=0))
        await end_unless_taken(socket, slots, NAME, STALL_SECONDS, faults.append)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.sleep(10 * STALL_SECONDS)
        assert not faults, "nobody minds"
        if is_wanted:
            nursery.start_soon(slots.acquire, "another")
        await trio.sleep(2 * LOOK_SECONDS)
        nursery.cancel_scope.cancel()
    assert [type(fault) for fault in faults] == [SendStalled] * is_wanted
