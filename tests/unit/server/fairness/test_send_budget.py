"""Shares of a turn: large for few, small for many, and never more than is to be had."""

from contextlib import AsyncExitStack

import trio

from jobworker.protocol.frames import PIECE_BYTES
from jobworker.server.fairness.fair_scheduling import ActiveClients
from jobworker.server.fairness.send_budget import LEAST_BYTES, TURN_BYTES, SendBudget


async def test_few_send_large_pieces_and_many_small_ones() -> None:
    send_budget = SendBudget(ActiveClients())
    async with AsyncExitStack() as sending:
        shares = [
            await sending.enter_async_context(send_budget.share(str(number % 7)))
            for number in range(1000)
        ]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] == PIECE_BYTES
        assert shares[-1] == LEAST_BYTES
        for number, share in enumerate(shares, 1):
            assert share == LEAST_BYTES or share * number <= TURN_BYTES
    async with send_budget.share("alone") as alone:
        assert alone == PIECE_BYTES


async def test_who_gives_up_counts_no_longer() -> None:
    send_budget = SendBudget(ActiveClients())

    async def send() -> None:
        async with send_budget.share("name"):
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(send)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    async with send_budget.share("alone") as alone:
        assert alone == PIECE_BYTES
