"""Replies and output reach those who asked, over one connection to a session in memory."""

import gc
import json
from typing import cast

import pytest
import trio
from attrs import evolve
from trio.testing import wait_all_tasks_blocked

from jobworker.client.dial import Connection
from jobworker.client.rpc_connection import RpcConnection
from jobworker.errors import (
    ConnectionFailed,
    NotFound,
    ProtocolError,
)
from jobworker.model.job import JobId, JobRecord, JobStatus
from jobworker.model.lifecycle import State
from jobworker.protocol import messages as m

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
