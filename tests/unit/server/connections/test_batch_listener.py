"""Connections that wait are accepted several in a turn of the event loop, and no more."""

import resource
import socket
from collections import Counter
from collections.abc import Container
from contextlib import ExitStack

import pytest
import trio
import trio.testing

from jobworker.server.connection import turn_away
from jobworker.server.connections.batch_listener import (
    A_TURN,
    MANY_WAIT,
    SHORT_REST_SECONDS,
    SHORTAGE_SECONDS,
    TURN_SECONDS,
    BatchListener,
)
from jobworker.server.fairness.connection_limiter import ConnectionLimiter
from jobworker.server.fairness.fair_scheduling import MAX_REST_SECONDS, ActiveClients

COUNT = 2 * A_TURN + 1


class Turns(trio.abc.Instrument):
    """Counts the turns of the event loop: it looks for I/O once in each."""

    def __init__(self) -> None:
        self.now = 0

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - as trio calls it
        """See trio.abc.Instrument."""
        self.now += 1


async def test_several_are_accepted_in_a_turn_and_no_more(
    mock_clock: trio.testing.MockClock,
) -> None:
    assert mock_clock.rate == 0, "by it no turn lasts too long"
    turns, accepted = Turns(), Counter[int]()
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=COUNT))
        listening.setblocking(False)
        for _ in range(COUNT):
            stack.enter_context(socket.create_connection(listening.getsockname()))
        listener = BatchListener(listening, lambda _: False, ActiveClients())

        trio.lowlevel.add_instrument(turns)
        for _ in range(COUNT):
            stream = await listener.accept()
            accepted[turns.now] += 1
            stream.socket.close()
        trio.lowlevel.remove_instrument(turns)
        await listener.aclose()
    assert sorted(accepted.values()) == [1, A_TURN, A_TURN]


async def test_who_is_turned_away_is_closed_and_many_are_in_a_turn(
    mock_clock: trio.testing.MockClock,
) -> None:
    turns, turned_away = Turns(), Counter[int]()

    def turn_away(_: socket.socket) -> bool:
        turned_away[turns.now] += 1
        mock_clock.jump(TURN_SECONDS / 9.5)
        return True

    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=200))
        listening.setblocking(False)
        clients = [
            stack.enter_context(socket.create_connection(listening.getsockname()))
            for _ in range(100)
        ]
        listener, accepted = BatchListener(listening, turn_away, ActiveClients()), 0
        trio.lowlevel.add_instrument(turns)
        with trio.move_on_after(5):
            while accepted + turned_away.total() < len(clients):
                stream = await listener.accept()
                accepted += 1
                stream.socket.close()
        trio.lowlevel.remove_instrument(turns)
        assert accepted + turned_away.total() == len(clients)
        assert max(turned_away.values()) == 10
        for client in clients:
            client.settimeout(5)
            assert client.recv(1) == b"", "closed"
        await listener.aclose()


class Rests(ActiveClients):
    """Notes how long they may be."""

    def __init__(self) -> None:
        super().__init__()
        self.most = list[float]()

    async def rest_after(
        self,
        began: float,  # noqa: ARG002 - as the listener calls it
        than: Container[str] = (),  # noqa: ARG002
        most_seconds: float = 0,
    ) -> None:
        """See Presence."""
        self.most.append(most_seconds)
        await trio.lowlevel.checkpoint()


async def test_rests_are_short_where_many_wait() -> None:
    active_clients = Rests()
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=200))
        listening.setblocking(False)
        for _ in range(MANY_WAIT + 20 * A_TURN):
            stack.enter_context(socket.create_connection(listening.getsockname()))
        listener = BatchListener(listening, lambda _: False, active_clients)
        for _ in range(MANY_WAIT + 20 * A_TURN):
            (await listener.accept()).socket.close()
        await listener.aclose()
    assert set(active_clients.most[:19]) == {SHORT_REST_SECONDS}
    assert set(active_clients.most[-10:]) == {MAX_REST_SECONDS}


@pytest.mark.parametrize("reset", [True, False])
async def test_connection_that_was_closed_meanwhile_is_turned_away(reset: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        for closes in (True, False):
            with socket.create_connection(listening.getsockname()) as client:
                if reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                if closes:
                    client.close()
                accepted, _ = listening.accept()
                with accepted:
                    assert turn_away(accepted, ConnectionLimiter()) is closes


async def test_descriptors_that_run_out_are_told_once_and_waited_for(
    caplog: pytest.LogCaptureFixture, mock_clock: trio.testing.MockClock
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    accepted: list[trio.SocketStream] = []

    async def accept() -> None:
        accepted.append(await listener.accept())

    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listening.setblocking(False)
        stack.enter_context(socket.create_connection(listening.getsockname()))
        listener = BatchListener(listening, lambda _: False, ActiveClients())
        with socket.socket() as lowest:
            least = lowest.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, hard))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            for _ in range(20):
                await trio.testing.wait_all_tasks_blocked()
                mock_clock.jump(SHORTAGE_SECONDS)
            assert not accepted
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            mock_clock.jump(SHORTAGE_SECONDS)
        accepted[0].socket.close()
        await listener.aclose()
    (told,) = caplog.messages
    assert (
        told == "cannot accept connections: Too many open files; raise LimitNOFILE= of the service"
    )
