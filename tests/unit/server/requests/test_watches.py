"""A conversation ends if its client is too slow."""

from types import SimpleNamespace
from typing import cast

import pytest
import trio

from jobworker.client.silence import SILENT_SECONDS
from jobworker.errors import JobworkerError, SendStalled
from jobworker.server.connections.framed_socket import FramedSocket
from jobworker.server.fairness.fair_scheduling import ActiveClients
from jobworker.server.fairness.slots import LOOK_SECONDS, Slots
from jobworker.server.requests.read_backpressure import ReadBackpressure
from jobworker.server.requests.watches import LIFE_SECONDS, end_unless_taken, show_life

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


async def test_pongs_are_sent_while_nothing_is_read_and_only_then(autojump_clock: object) -> None:
    """A client that waits for its turn with a large request sees that the service lives."""
    sent = list[float]()

    class Socket:
        async def pong(self) -> None:
            await trio.lowlevel.checkpoint()
            sent.append(trio.current_time())

    intake = ReadBackpressure(Slots(2, 2), NAME, 60, ActiveClients())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(show_life, cast(FramedSocket, Socket()), intake)
        await trio.sleep(100 * LIFE_SECONDS)
        assert not sent
        began = trio.current_time()
        with intake.pause():
            await trio.sleep(3.5 * LIFE_SECONDS)
        await trio.sleep(100 * LIFE_SECONDS)
        assert sent == [began + turns * LIFE_SECONDS for turns in (1, 2, 3)]
        with intake.pause():
            await trio.sleep(1.5 * LIFE_SECONDS)
        assert len(sent) == 4
        await trio.sleep(100 * LIFE_SECONDS)
        with intake.stop():  # a message waits until its client has room for another call
            assert not intake.paused, "the client's answers are still waited for"
            await trio.sleep(1.5 * LIFE_SECONDS)
        assert len(sent) == 5
        for _ in range(40):  # messages that are taken one after the other
            with intake.stop():
                await trio.sleep(0.9 * LIFE_SECONDS)
            await trio.sleep(0.01 * LIFE_SECONDS)
        assert len(sent) == 5
        nursery.cancel_scope.cancel()


def test_service_shows_life_well_before_a_client_gives_it_up() -> None:
    assert 2 * LIFE_SECONDS < SILENT_SECONDS
