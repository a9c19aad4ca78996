"""One follow over several connections, each a client against a session in memory."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from attrs import define, field

from jobworker.client.client import Client
from jobworker.client.following import Chunk, Following
from jobworker.client.resuming import PATIENCE_SECONDS, ResumingFollow
from jobworker.errors import ConnectionFailed, JobworkerError, OutputError
from jobworker.model.job import JobId, JobRecord
from jobworker.model.lifecycle import State
from jobworker.protocol import messages as m

from .test_client import Peer, connected

Part = Callable[[Peer], None]
"""What a server does with one subscription."""


@define(eq=False)
class Servers:
    """A server for each connection: the parts that it plays, then the connection breaks."""

    plays: list[list[Part]]
    asked: list[m.LogParams] = field(factory=list)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        if not self.plays:
            raise ConnectionFailed("cannot connect: nobody there")
        parts = self.plays.pop(0)
        raised: JobworkerError | None = None
        async with connected() as (client, peer), trio.open_nursery() as nursery:
            nursery.start_soon(self.serve, peer, parts)
            try:
                yield client
            except JobworkerError as error:  # out of the nurseries, as `open_client` has it
                raised = error
            nursery.cancel_scope.cancel()
        if raised is not None:
            raise raised

    async def serve(self, peer: Peer, parts: list[Part]) -> None:
        number = 0
        while parts:
            call = await peer.call()
            if isinstance(call.params, m.LogParams):
                self.asked.append(call.params)
                number += 1
                result = m.LogResult(subscription=number, offset=call.params.offset or 5)
                peer.reply(call, result)
                parts.pop(0)(peer)
        peer.hang_up()


def resuming(servers: Servers, seen: list[bytes], told: list[int]) -> ResumingFollow:
    async def begin(client: Client) -> Following:
        return await client.log(7, tail_lines=2)

    async def resume(client: Client, job: JobId, offset: int) -> Following:
        return await client.log(job, offset=offset)

    async def take(chunk: Chunk) -> None:
        await trio.lowlevel.checkpoint()
        seen.append(chunk.data)

    async def started(_: Following) -> None:
        await trio.lowlevel.checkpoint()

    def lost(_: JobworkerError, offset: int) -> None:
        told.append(offset)

    return ResumingFollow(
        connect=servers.connect,
        begin=begin,
        resume=resume,
        take=take,
        tell_started=started,
        tell_lost=lost,
        job=JobId(7),
    )


async def follow(*plays: list[Part]) -> tuple[Servers, list[bytes], list[int], JobRecord]:
    servers, seen, told = Servers(list(plays)), list[bytes](), list[int]()
    record = await resuming(servers, seen, told).run()
    return servers, seen, told, record


def nothing(_: Peer) -> None:
    """Open the subscription, and break."""


async def test_broken_connection_goes_on_where_it_stopped(autojump_clock: object) -> None:
    def finish(peer: Peer) -> None:
        peer.output(1, 8, b"de")
        peer.end(1, 10)

    servers, seen, told, record = await follow(
        [lambda peer: peer.output(1, 5, b"abc")],
        [nothing],
        [finish],
    )
    assert (b"".join(seen), record.state) == (b"abcde", State.COMPLETED)
    assert [(asked.offset, asked.tail_lines) for asked in servers.asked] == [
        (0, 2),
        (8, None),
        (8, None),
    ]
    assert told == [8, 8]


async def test_break_before_the_first_byte_does_not_move_the_start(autojump_clock: object) -> None:
    servers, seen, _, _ = await follow([nothing], [lambda peer: peer.end(1, 5)])
    assert not seen
    assert servers.asked[1].offset == 5  # where the first tail began, not a later tail


async def test_stalled_follower_comes_back_on_the_same_connection(autojump_clock: object) -> None:
    def stall(peer: Peer) -> None:
        peer.output(1, 5, b"abc")
        peer.end(1, 8, name="follower_stalled", message="cannot go on sending")

    servers, seen, told, _ = await follow([stall, lambda peer: peer.end(2, 8)])
    assert (seen, told) == ([b"abc"], [])
    assert servers.asked[1].offset == 8


async def test_first_connection_must_succeed() -> None:
    with pytest.raises(ConnectionFailed, match="nobody there"):
        await follow()


async def test_patience_ends(autojump_clock: object) -> None:
    begun = trio.current_time()
    with pytest.raises(ConnectionFailed, match="nobody there"):
        await follow([lambda peer: peer.output(1, 5, b"abc")])
    assert PATIENCE_SECONDS <= trio.current_time() - begun <= PATIENCE_SECONDS + 10


async def test_what_the_server_says_of_the_output_is_raised() -> None:
    def fail(peer: Peer) -> None:
        peer.end(1, 5, name="output_failed", message="cannot read the job's output: I/O error")

    with pytest.raises(OutputError, match="I/O error"):
        await follow([fail])
