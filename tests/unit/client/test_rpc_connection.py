"""Replies and output reach those who asked, over one connection to a session in memory."""

import gc
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio
from attrs import define, evolve, field
from trio.testing import wait_all_tasks_blocked

from jobworker.client.dial import Connection
from jobworker.client.rpc_connection import WORD_SECONDS, RpcConnection, RpcConnectionLost
from jobworker.errors import (
    ConnectionFailed,
    JobworkerError,
    MessageTooLarge,
    NotFound,
    ProtocolError,
)
from jobworker.model.job import JobId, JobRecord, JobStatus
from jobworker.model.lifecycle import State
from jobworker.protocol import messages as m
from jobworker.protocol.session import Reply

from .memory_servers import (
    RECORD,
    SPEC,
    Peer,
    Servers,
    connected,
    opened,
    served,
)


async def test_replies_reach_their_calls_in_any_order() -> None:
    found: dict[int, JobRecord] = {}

    async with connected() as (client, peer), trio.open_nursery() as nursery:

        async def ask(job: int) -> None:
            found[job] = await client.job(job).status()

        for job in (1, 2, 3):
            nursery.start_soon(ask, job)
        calls = [await peer.call() for _ in range(3)]
        for call in reversed(calls):
            assert isinstance(call.params, m.JobParams)
            peer.reply(call, evolve(RECORD, id=call.params.id))
    assert {job: record.id for job, record in found.items()} == {1: 1, 2: 2, 3: 3}


async def test_an_error_reply_is_raised_as_its_class() -> None:
    async with connected() as (client, peer), trio.open_nursery() as nursery:

        async def refuse() -> None:
            call = await peer.call()
            assert call.id is not None
            error = NotFound("cannot find job 9", remedy="look", data={"job": 9})
            peer.to_client.send_nowait(peer.session.error(call.id, error))

        nursery.start_soon(refuse)
        with pytest.raises(NotFound, match="cannot find job 9; look") as caught:
            await client.job(9).status()
        assert caught.value.data == {"job": 9}


async def test_call_in_a_cancelled_scope_is_not_made() -> None:
    asked = list[str]()

    async def play(peer: Peer) -> None:
        while True:
            call = await peer.call()
            asked.append(call.method.name)
            peer.reply(call, m.Removed(jobs=(JobId(7),), bytes=0))

    async with served(Servers([play])) as client:
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.run(SPEC)
        assert (await client.job(7).remove()).jobs == (7,)
    assert asked == ["job.remove"]


async def test_call_that_is_cancelled_before_its_turn_to_be_sent_is_not_made() -> None:
    sent, may_go_on = list[str](), trio.Event()

    class Line:
        """Takes a message, and nothing more for a while."""

        async def send(self, message: str) -> None:
            sent.append(json.loads(message)["method"])
            await may_go_on.wait()

    rpc = RpcConnection(cast(Connection, Line()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rpc.serve_writer)
        nursery.start_soon(rpc.call, "job.list", m.ListParams(), m.ListResult)
        await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as others:
                others.start_soon(rpc.call, "job.status", m.JobParams(id=JobId(7)), JobStatus)
                await wait_all_tasks_blocked()
                scope.cancel()
        nursery.start_soon(rpc.call, "volume.list", m.Nothing(), m.Volumes)
        may_go_on.set()
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sent == ["job.list", "volume.list"]
    assert len(rpc._pending) == 2


async def test_cancelling_a_call_abandons_only_its_wait() -> None:
    async with connected() as (client, peer):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.job(7).wait)
                abandoned = await peer.call()
                scope.cancel()
        peer.reply(abandoned, RECORD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.job(8).status)
            later = await peer.call()
            assert later.method.name == "job.status"
            peer.reply(later, RECORD)


async def test_a_subscription_that_nobody_took_is_ended() -> None:
    async with connected() as (client, peer):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(anext, client.job(7).output())
                abandoned = await peer.call()
                scope.cancel()
        peer.reply(abandoned, m.LogResult(subscription=1, offset=0))
        peer.output(1, 0, b"late")
        call = await peer.call()
        assert call.method.name == "job.unfollow"
        assert call.params == m.SubscriptionParams(subscription=1)


async def test_output_before_the_reply_is_kept() -> None:
    async with connected() as (client, peer):

        async def serve() -> None:
            call = await peer.call()
            peer.output(1, 0, b"first ")
            peer.output(1, 6, b"second")
            peer.reply(call, m.RunResult(job=RECORD, subscription=1))
            peer.end(1, 12)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            job = await client.run(SPEC, follow=True)
            assert job.record == RECORD
            with job.output() as output:
                data = [chunk.data async for chunk in output]
        assert data == [b"first ", b"second"]
        assert output.offset == 12
        assert output.record is not None
        assert output.record.state is State.COMPLETED
        await wait_all_tasks_blocked()
        with pytest.raises(trio.WouldBlock):  # an ended subscription needs no unfollow
            peer.sent.receive_nowait()


async def test_output_of_a_closed_subscription_is_dropped() -> None:
    async with connected() as (client, peer):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))

            nursery.start_soon(serve)
            (await opened(client)).close()
        assert (await peer.call()).method.name == "job.unfollow"
        peer.output(1, 0, b"late")
        peer.end(1, 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.job(7).status)
            peer.reply(await peer.call(), RECORD)
        assert client._calls._rpc is not None
        assert client._calls._rpc._inboxes == {}


async def test_lost_connection_wakes_everyone() -> None:
    failures: list[str] = []

    async with connected() as (client, peer):

        async def fail(name: str) -> None:
            if name == "wait":
                with pytest.raises(ConnectionFailed):
                    await client.job(7).wait()
            else:
                output = await opened(client)
                with pytest.raises(ConnectionFailed):
                    await anext(output)
            failures.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, "log")
            peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))
            nursery.start_soon(fail, "wait")
            await peer.call()
            peer.hang_up()
        assert sorted(failures) == ["log", "wait"]
        with pytest.raises(ConnectionFailed):
            await client.job(7).status()


async def test_a_server_that_breaks_the_protocol_is_left() -> None:
    async with connected() as (client, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            await peer.call()
            peer.to_client.send_nowait('{"jsonrpc":"2.0","id":99,"result":{}}')

        nursery.start_soon(serve)
        with pytest.raises(ProtocolError, match="no call with its id"):
            await client.job(7).status()


async def test_output_that_was_left_half_way_is_ended_with_the_next_message() -> None:
    async with connected() as (client, peer):

        async def serve() -> None:
            peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))
            peer.output(1, 0, b"first")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async for _ in client.job(7).output():
                break
        gc.collect()
        peer.output(1, 5, b"second")
        assert (await peer.call()).params == m.SubscriptionParams(subscription=1)


# --- one connection by itself ---------------------------------------------------------------

BROKE = ConnectionFailed("it broke", remedy="connect again", data={"a": 1})
Done = JobRecord | JobworkerError | RpcConnectionLost


@define(eq=False)
class Line:
    """A connection whose sends a test allows or breaks, and on which it says what is received."""

    is_ended: bool = False
    fault: JobworkerError | None = None
    takes: trio.Event = field(factory=trio.Event)
    sent: list[str] = field(factory=list)
    told: trio.Event = field(factory=trio.Event)
    word: JobworkerError = BROKE

    async def send(self, message: str) -> None:
        self.sent.append(json.loads(message)["method"])
        await self.takes.wait()
        if self.fault is not None:
            raise self.fault

    async def receive(self) -> str:
        await self.told.wait()
        raise self.word


@define(eq=False)
class Caller:
    """A connection with its calls: what came of each, and whether a server may have it."""

    line: Line
    rpc: RpcConnection
    nursery: trio.Nursery
    done: dict[str, Done] = field(factory=dict)
    sent: dict[str, list[bool]] = field(factory=dict)

    async def call(self, name: str) -> None:
        """Make a call, and wait until nothing more happens."""
        told = self.sent.setdefault(name, [])

        async def call() -> None:
            params = m.ListParams(name=name)
            try:
                await self.rpc.call("job.list", params, m.ListResult, told.append)
            except (JobworkerError, RpcConnectionLost) as error:
                self.done[name] = error

        self.nursery.start_soon(call)
        await wait_all_tasks_blocked()

    def lost(self, name: str) -> RpcConnectionLost:
        """The loss that a call has met."""
        lost = self.done[name]
        assert isinstance(lost, RpcConnectionLost)
        return lost


@asynccontextmanager
async def calling() -> AsyncIterator[Caller]:
    line = Line()
    rpc = RpcConnection(cast(Connection, line))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rpc.serve_writer)
        nursery.start_soon(rpc.serve_reader)
        yield Caller(line, rpc, nursery)
        nursery.cancel_scope.cancel()


async def test_loss_says_what_the_server_may_have() -> None:
    async with calling() as caller:
        await caller.call("ä" * 9)
        await caller.call("queued")
        caller.rpc.lose(BROKE)
        await wait_all_tasks_blocked()
        first, queued = caller.lost("ä" * 9), caller.lost("queued")
        assert (first.sent, first.broke) == (True, True)
        assert (queued.sent, queued.broke) == (False, False)
        assert first.size - queued.size == 2 * 9 - len("queued"), "in bytes"
        assert caller.sent == {"ä" * 9: [True], "queued": []}
        for lost in (first, queued):
            assert lost.reason is not BROKE
            assert str(lost.reason) == str(BROKE)


async def test_server_that_had_announced_its_end_broke_no_call() -> None:
    async with calling() as caller:
        await caller.call("sent")
        caller.line.is_ended = True
        caller.rpc.lose(BROKE)
        await wait_all_tasks_blocked()
        assert (caller.lost("sent").sent, caller.lost("sent").broke) == (True, False)


async def test_call_on_a_lost_connection_is_not_sent() -> None:
    async with calling() as caller:
        caller.rpc.lose(BROKE)
        caller.rpc.lose(ConnectionFailed("later"))
        await caller.call("late")
        lost = caller.lost("late")
        assert (lost.sent, lost.broke, str(lost.reason)) == (False, False, str(BROKE))
        caller.rpc._grant(1, 5)
        await wait_all_tasks_blocked()
        assert caller.line.sent == []


async def test_request_that_was_not_sent_whole_is_not_the_servers(autojump_clock: object) -> None:
    async with calling() as caller:
        caller.line.fault = ConnectionFailed("cannot send")
        await caller.call("cut off")
        began = trio.current_time()
        caller.line.takes.set()
        await caller.rpc.lost.wait()
        await wait_all_tasks_blocked()
        assert trio.current_time() - began == pytest.approx(WORD_SECONDS)
        assert caller.sent == {"cut off": [True, False]}
        assert caller.lost("cut off").sent is False
        assert str(caller.lost("cut off").reason) == "cannot send"


async def test_servers_word_counts_more_than_the_failed_send(autojump_clock: object) -> None:
    async with calling() as caller:
        caller.line.fault, caller.line.word = ConnectionFailed("cannot send"), NotFound("its word")
        await caller.call("cut off")
        caller.line.takes.set()
        await wait_all_tasks_blocked()
        caller.line.told.set()
        await wait_all_tasks_blocked()
        assert str(caller.lost("cut off").reason) == "its word"
        assert caller.lost("cut off").sent is False


async def test_largest_request_is_the_one_that_was_too_large() -> None:
    async with calling() as caller:
        for name in ("small", "l" * 100, "other"):
            await caller.call(name)
        caller.rpc.lose(MessageTooLarge("at most 99"))
        await wait_all_tasks_blocked()
        refused = caller.done["l" * 100]
        assert isinstance(refused, MessageTooLarge)
        assert "(at most 99); it was not executed" in refused.message
        for name in ("small", "other"):
            assert isinstance(caller.lost(name).reason, ConnectionFailed)
            assert "ended for a message's size: at most 99" in str(caller.lost(name).reason)


async def test_reply_that_came_before_the_loss_counts() -> None:
    async with connected() as (client, peer), trio.open_nursery() as nursery:
        got = list[JobRecord]()

        async def ask() -> None:
            got.append(await client.job(7).status())

        nursery.start_soon(ask)
        peer.reply(await peer.call(), RECORD)
        peer.hang_up()
        await wait_all_tasks_blocked()
        assert [record.id for record in got] == [RECORD.id]


async def test_subscription_of_a_reply_that_came_with_the_cancellation_is_ended() -> None:
    async with connected() as (client, peer), trio.open_nursery() as nursery:
        rpc, scope = client._calls._rpc, trio.CancelScope()
        assert rpc is not None

        async def ask() -> None:
            with scope:
                await rpc.call("job.log", m.LogParams(id=JobId(7)), m.LogResult)

        nursery.start_soon(ask)
        call = await peer.call()
        assert call.id is not None
        scope.cancel()
        rpc._dispatch(Reply(1, m.LogResult(subscription=1, offset=0), None))
        assert (await peer.call()).params == m.SubscriptionParams(subscription=1)
        assert rpc._inboxes == {}


async def test_request_that_was_dropped_before_it_was_sent_leaves_nothing() -> None:
    async with calling() as caller:
        await caller.call("first")
        with trio.CancelScope() as scope:
            scope.cancel()
            await caller.rpc.call("job.list", m.ListParams(), m.ListResult)
        assert len(caller.rpc._pending) == 1, "it is not even queued"
        with trio.move_on_after(0.01):
            await caller.rpc.call("job.list", m.ListParams(), m.ListResult)
        caller.line.takes.set()
        await wait_all_tasks_blocked()
        assert len(caller.rpc._pending) == len(caller.rpc._session._methods) == 1
