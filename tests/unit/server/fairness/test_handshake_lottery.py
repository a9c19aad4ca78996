"""Turns are drawn by lot, and only those who are there take one."""

import pytest
import trio
import trio.testing
from attrs import define, field

from jobworker.errors import JobworkerError
from jobworker.server.fairness.handshake_lottery import TURN_SECONDS, HandshakeLottery


@define(eq=False)
class Client:
    """Who waits."""

    name: str
    gone: bool = False
    told: JobworkerError | None = None
    had_turn_at: float | None = None
    scope: trio.CancelScope = field(factory=trio.CancelScope)

    def is_gone(self) -> bool:
        return self.gone

    def drop(self, why: JobworkerError | None) -> None:
        self.told = why
        self.scope.cancel()

    async def wait(self, lottery: HandshakeLottery) -> None:
        with self.scope:
            await lottery.wait_turn(self)
            self.had_turn_at = trio.current_time()


async def waiting(lottery: HandshakeLottery, nursery: trio.Nursery, count: int) -> list[Client]:
    """So many that have come one after the other, after a turn that has just been taken."""
    await Client("before").wait(lottery)
    clients = [Client(str(number)) for number in range(count)]
    for client in clients:
        nursery.start_soon(client.wait, lottery)
        await trio.testing.wait_all_tasks_blocked()
    return clients


async def test_each_has_its_turn_alone(autojump_clock: object) -> None:
    lottery = HandshakeLottery()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        clients = await waiting(lottery, nursery, 20)
    had = sorted(client.had_turn_at or 0 for client in clients)
    assert had == pytest.approx([began + TURN_SECONDS * (n + 1) for n in range(20)])


async def test_last_may_be_the_first(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.randrange", lambda end: end - 1)
    lottery = HandshakeLottery()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        clients = await waiting(lottery, nursery, 20)
    assert clients[-1].had_turn_at == pytest.approx(began + TURN_SECONDS)


async def test_who_has_gone_costs_no_turn(autojump_clock: object) -> None:
    lottery = HandshakeLottery()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        clients = await waiting(lottery, nursery, 20)
        for client in clients[:-1]:
            client.gone = True
    assert clients[-1].had_turn_at is not None
    assert clients[-1].had_turn_at <= began + 2 * TURN_SECONDS
    assert [client.had_turn_at for client in clients[:-1]] == [None] * 19


async def test_turn_of_who_gives_up_is_not_lost(autojump_clock: object) -> None:
    lottery = HandshakeLottery()
    async with trio.open_nursery() as nursery:
        clients = await waiting(lottery, nursery, 3)
        clients[0].scope.cancel()  # it waits for the time of the next
    assert all(client.had_turn_at for client in clients[1:])
