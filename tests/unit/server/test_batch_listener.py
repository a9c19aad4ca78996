"""Connections that wait are accepted several in a turn of the event loop, and no more."""

import socket
from collections import Counter
from contextlib import ExitStack

import trio

from jobworker.server.batch_listener import A_TURN, BatchListener

COUNT = 2 * A_TURN + 1


class Turns(trio.abc.Instrument):
    """Counts the turns of the event loop: it looks for I/O once in each."""

    def __init__(self) -> None:
        self.now = 0

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - as trio calls it
        """See trio.abc.Instrument."""
        self.now += 1


async def test_several_are_accepted_in_a_turn_and_no_more() -> None:
    turns, accepted = Turns(), Counter[int]()
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=COUNT))
        listening.setblocking(False)
        for _ in range(COUNT):
            stack.enter_context(socket.create_connection(listening.getsockname()))
        listener = BatchListener(listening)

        trio.lowlevel.add_instrument(turns)
        for _ in range(COUNT):
            stream = await listener.accept()
            accepted[turns.now] += 1
            stream.socket.close()
        trio.lowlevel.remove_instrument(turns)
        await listener.aclose()
    assert sorted(accepted.values()) == [1, A_TURN, A_TURN]
