"""Connections that wait are accepted several in a turn of the event loop, and no more."""

import socket
from collections import Counter
from contextlib import ExitStack

import trio

from jobworker.server.batch_listener import A_TURN, BatchListener

COUNT = 2 * A_TURN + 1


async def test_several_are_accepted_in_a_turn_and_others_run_between() -> None:
    turn, accepted = 0, Counter[int]()
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=COUNT))
        listening.setblocking(False)
        for _ in range(COUNT):
            stack.enter_context(socket.create_connection(listening.getsockname()))
        listener = BatchListener(listening)

        async def accept() -> None:
            for _ in range(COUNT):
                stream = await listener.accept()
                accepted[turn] += 1
                stream.socket.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            while accepted.total() < COUNT:
                await trio.lowlevel.checkpoint()
                turn += 1
        await listener.aclose()
    assert sorted(accepted.values()) == [1, A_TURN, A_TURN]
