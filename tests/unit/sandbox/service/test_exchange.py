"""Requests that overlap on one socket: each gets its own reply, and none hangs."""

import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from jobworker.errors import JobworkerError, LauncherGone, LauncherSilent, OutOfDescriptors
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.accounting import ScopeLimits
from jobworker.sandbox.protocol import events
from jobworker.sandbox.protocol import operations as ops
from jobworker.sandbox.protocol import requests as q
from jobworker.sandbox.protocol.replies import Promised
from jobworker.sandbox.service.exchange import Exchange, _body_of
from jobworker.sandbox.service.launcher_errors import reply_was_lost
from jobworker.sandbox.start.plan import Order

from ....descriptors import descriptors

Asked = tuple[ops.Operation[Any, Any], q.Request]
LARGE: Asked = ops.LIST_VOLUMES, q.ListVolumes()
SMALL: Asked = ops.PROMISED, q.PromisedBytes()


class Played:
    """An exchange that is served, and the launcher's end of its socket, which the test plays."""

    def __init__(self, exchange: Exchange, far: socket.socket, nursery: trio.Nursery) -> None:
        self.exchange, self.far, self.nursery = exchange, far, nursery
        self.outcomes: dict[str, object] = {}

    async def ask(self, name: str, operation: ops.Operation[Any, Any], request: q.Request) -> None:
        """Ask, and keep the reply or the error by a name."""
        try:
            self.outcomes[name] = await self.exchange.request(operation, request)
        except JobworkerError as error:
            self.outcomes[name] = error

    async def begin(self, name: str, asked: Asked = SMALL) -> channel.Message:
        """Begin to ask in a task, and return the message that comes to the launcher."""
        self.nursery.start_soon(self.ask, name, *asked)
        await self.settle()
        received = channel.receive(self.far)
        assert received is not None
        return received[0]

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)


@asynccontextmanager
async def open_played(on_event: list[events.Event] | None = None) -> AsyncIterator[Played]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.setblocking(False)
    seen = [] if on_event is None else on_event
    with trio.socket.from_stdlib_socket(near) as sock, far:
        exchange = Exchange(sock, seen.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange.serve)
            yield Played(exchange, far, nursery)
            nursery.cancel_scope.cancel()


async def test_replies_in_any_order_reach_their_own_requests() -> None:
    async with open_played() as played:
        one, two = await played.begin("one"), await played.begin("two")
        assert one["id"] != two["id"]
        channel.send(played.far, {"id": two["id"], "ok": {"bytes": 2}})
        channel.send(played.far, {"id": one["id"], "ok": {"bytes": 1}})
        await played.settle()
    assert played.outcomes == {"one": (Promised(1), []), "two": (Promised(2), [])}


async def test_request_without_interest_in_its_reply_does_not_wait() -> None:
    events_seen: list[events.Event] = []
    async with open_played(events_seen) as played:
        with trio.fail_after(20):
            await played.exchange.send(q.Ping())
        received = channel.receive(played.far)
        assert received is not None
        assert received[0]["op"] == "ping"
        before = descriptors()
        channel.send(played.far, {"id": received[0]["id"], "ok": {}}, [played.far.fileno()])
        await played.settle()
        assert descriptors() == before, "what nobody has asked for is closed"
    assert not events_seen


async def test_descriptors_of_a_reply_are_the_callers() -> None:
    async with open_played() as played:
        order = Order("job", ("true",), {}, "")
        asked = await played.begin("start", (ops.SPAWN, q.Spawn(3, order, ScopeLimits())))
        null = played.far.fileno()
        channel.send(played.far, {"id": asked["id"], "ok": {"pid": 9}}, [null, null])
        await played.settle()
        outcome = played.outcomes["start"]
        assert isinstance(outcome, tuple)
        assert outcome[0].pid == 9
        assert len(outcome[1]) == 2
        channel.close_all(outcome[1])


async def test_cancelled_request_still_takes_its_reply() -> None:
    """It was sent and has its effect: otherwise a job might run of which nobody knows."""
    scope = trio.CancelScope()
    async with open_played() as played:

        async def ask() -> None:
            with scope:
                await played.ask("one", *SMALL)

        played.nursery.start_soon(ask)
        await played.settle()
        received = channel.receive(played.far)
        assert received is not None
        scope.cancel()
        await played.settle()
        assert not played.outcomes
        channel.send(played.far, {"id": received[0]["id"], "ok": {"bytes": 5}})
        await played.settle()
    assert played.outcomes == {"one": (Promised(5), [])}


async def test_end_of_the_launcher_fails_every_request_at_once() -> None:
    async with open_played() as played:
        await played.begin("waits")
        played.far.close()
        with trio.fail_after(20):
            await played.exchange.gone.wait()
            await played.settle()
            await played.ask("late", *SMALL)
    assert {name: type(error) for name, error in played.outcomes.items()} == {
        "waits": LauncherGone,
        "late": LauncherGone,
    }


async def test_end_of_the_service_tells_what_was_sent_apart_from_what_was_not() -> None:
    async with open_played() as played:
        await played.begin("sent")
        played.exchange.give_up()
        await played.settle()
        await played.ask("late", *SMALL)
    told = {name: getattr(error, "data", None) for name, error in played.outcomes.items()}
    assert told == {"sent": {}, "late": {"sent": False}}
    assert {type(error) for error in played.outcomes.values()} == {LauncherSilent}


@contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """Let this process open so many descriptors more, and no others."""
    taken = os.dup(0)
    os.close(taken)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_reply_whose_descriptors_are_lost_fails_its_own_request() -> None:
    async with open_played() as played:
        order = Order("job", ("true",), {}, "")
        start = await played.begin("start", (ops.SPAWN, q.Spawn(3, order, ScopeLimits())))
        await played.begin("other", LARGE)
        null = played.far.fileno()
        channel.send(played.far, {"id": start["id"], "ok": {"pid": 9}}, [null, null])
        with descriptors_left(1):
            await played.settle()
        assert set(played.outcomes) == {"start"}
        assert type(played.outcomes["start"]) is OutOfDescriptors
        assert not played.exchange.gone.is_set()


async def test_reply_whose_number_is_lost_fails_those_that_may_be_large() -> None:
    """It came in a descriptor of its own, which could not be opened."""
    async with open_played() as played:
        large = await played.begin("large", LARGE)
        small = await played.begin("small")
        long = {"name": "x" * channel.PACKET_BYTES}
        channel.send(played.far, {"id": large["id"], "ok": {"volumes": [long]}})
        with descriptors_left(0):
            await played.settle()
        assert set(played.outcomes) == {"large"}
        assert type(played.outcomes["large"]) is OutOfDescriptors
        channel.send(played.far, {"id": small["id"], "ok": {"bytes": 1}})
        await played.settle()
    assert played.outcomes["small"] == (Promised(1), [])


async def test_large_request_leaves_no_descriptor_open() -> None:
    order = Order("job", ("true",), {"A": "x" * channel.PACKET_BYTES}, "")
    async with open_played() as played:
        before = descriptors()
        asked = await played.begin("start", (ops.SPAWN, q.Spawn(3, order, ScopeLimits())))
        assert asked["environment"] == order.environment
        assert descriptors() == before


async def test_large_request_for_which_no_descriptor_is_left_is_refused() -> None:
    async with open_played() as played:
        order = Order("job", ("true",), {"A": "x" * channel.PACKET_BYTES}, "")
        with descriptors_left(0):
            await played.ask("start", ops.SPAWN, q.Spawn(3, order, ScopeLimits()))
        refusal = played.outcomes["start"]
        assert type(refusal) is OutOfDescriptors
        assert not reply_was_lost(refusal), "else a job that waits would be given up"
        assert not played.exchange._waiting, "else the launcher would be asked whether it answers"
        await played.begin("next")
        with pytest.raises(BlockingIOError):
            channel.receive(played.far)


class ShortOfMemory:
    """A socket for whose packets the kernel has no memory a few times."""

    def __init__(self, sock: Any, error: int, times: int = 3) -> None:
        self._sock, self._refusals = sock, [error] * times

    async def sendmsg(self, *arguments: Any) -> Any:
        if self._refusals:
            error = self._refusals.pop()
            raise OSError(error, os.strerror(error))
        return await self._sock.sendmsg(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


@pytest.mark.parametrize("error", [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS])
async def test_request_is_sent_once_the_kernel_has_memory_for_it(
    autojump_clock: trio.testing.MockClock, error: int
) -> None:
    async with open_played() as played:
        sock: Any = ShortOfMemory(played.exchange._sock, error)
        played.exchange._sock = sock
        played.nursery.start_soon(played.ask, "small", *SMALL)
        await trio.sleep(5)
        received = channel.receive(played.far)
        assert received is not None
        assert received[0]["op"] == SMALL[0].name


async def test_request_that_finds_no_memory_is_given_up_with_the_service(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_played() as played:
        sock: Any = ShortOfMemory(played.exchange._sock, errno.ENOBUFS, times=1000)
        played.exchange._sock = sock
        played.nursery.start_soon(played.ask, "small", *SMALL)
        await trio.sleep(5)
        played.exchange.give_up()
        await played.settle()
        refusal = played.outcomes["small"]
        assert isinstance(refusal, LauncherSilent)
        assert refusal.data == {"sent": False}


async def test_other_tasks_run_while_a_long_message_is_encoded() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    words: channel.Message = {"arguments": ["x" * 100] * 10_000}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        body = await _body_of(words)
        nursery.cancel_scope.cancel()
    assert turns > 3
    assert len(body) > 1_000_000
