"""A job's output over several connections, each to a session in memory."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from attrs import define, field

from jobworker.client.calls import PATIENCE_SECONDS
from jobworker.errors import (
    ConnectionFailed,
    JobworkerError,
    OutputError,
)
from jobworker.model.job import JobRecord, Stream
from jobworker.model.lifecycle import State
from jobworker.protocol import messages as m

from .memory_servers import Peer, Servers, served

Part = Callable[[Peer], None]
"""What a server does with one subscription."""


def nothing(_: Peer) -> None:
    """Open the subscription, and break."""


@define(eq=False)
class Logs:
    """What servers were asked for, and their plays: each has parts, then the connection breaks."""

    asked: list[m.LogParams] = field(factory=list)
    starts: tuple[m.StreamStart, ...] = ()

    def play(self, *parts: Part) -> Callable[[Peer], Awaitable[None]]:
        async def serve(peer: Peer) -> None:
            for number, part in enumerate(parts, 1):
                call = await peer.call()
                while not isinstance(call.params, m.LogParams):  # an unfollow, say
                    call = await peer.call()
                self.asked.append(call.params)
                result = m.LogResult(
                    subscription=number, offset=call.params.offset or 5, starts=self.starts
                )
                peer.reply(call, result)
                part(peer)
            peer.hang_up()

        return serve


async def follow(logs: Logs, *plays: list[Part]) -> tuple[list[bytes], list[int], JobRecord]:
    """Follow a job over these servers: the chunks, where it went on, and the final record."""
    seen, told = list[bytes](), list[int]()
    servers = Servers([logs.play(*parts) for parts in plays])

    def lost(_: JobworkerError, offset: int) -> None:
        told.append(offset)

    async with served(servers, PATIENCE_SECONDS) as client:
        output = client.job(7).output(tail_lines=2, on_break=lost)
        async for chunk in output:
            seen.append(chunk.data)
        assert output.record is not None
        return seen, told, output.record


async def test_broken_connection_goes_on_where_it_stopped(autojump_clock: object) -> None:
    def finish(peer: Peer) -> None:
        peer.output(1, 8, b"de")
        peer.end(1, 10)

    logs = Logs()
    seen, told, record = await follow(
        logs, [lambda peer: peer.output(1, 5, b"abc")], [nothing], [finish]
    )
    assert (b"".join(seen), record.state) == (b"abcde", State.COMPLETED)
    assert [(asked.offset, asked.tail_lines) for asked in logs.asked] == [
        (0, 2),
        (8, None),
        (8, None),
    ]
    assert told == [8, 8]


async def test_break_before_the_first_byte_does_not_move_the_start(autojump_clock: object) -> None:
    logs = Logs()
    seen, _, _ = await follow(logs, [nothing], [lambda peer: peer.end(1, 5)])
    assert not seen
    assert logs.asked[1].offset == 5  # where the first tail began, not a later tail
    assert logs.asked[1].tail_lines is None


async def test_streams_that_have_not_begun_begin_where_they_were_to(
    autojump_clock: object,
) -> None:
    starts = (m.StreamStart(stream=Stream.STDOUT, offset=3), m.StreamStart(stream=Stream.STDERR))
    logs = Logs(starts=starts)
    await follow(
        logs,
        [nothing],
        [lambda peer: peer.output(1, 5, b"abc")],
        [lambda peer: peer.end(1, 8)],
    )
    assert [asked.starts for asked in logs.asked] == [(), starts, starts[1:]]


async def test_stalled_follower_comes_back_on_the_same_connection(autojump_clock: object) -> None:
    def stall(peer: Peer) -> None:
        peer.output(1, 5, b"abc")
        peer.end(1, 8, name="follower_stalled", message="cannot go on sending")

    logs = Logs()
    seen, told, _ = await follow(logs, [stall, lambda peer: peer.end(2, 8)])
    assert (seen, told) == ([b"abc"], [])
    assert logs.asked[1].offset == 8


async def test_what_the_server_says_of_the_output_is_raised() -> None:
    def fail(peer: Peer) -> None:
        peer.end(1, 5, name="output_failed", message="cannot read the job's output: I/O error")

    with pytest.raises(OutputError, match="I/O error"):
        await follow(Logs(), [fail])


async def test_first_connection_must_succeed() -> None:
    with pytest.raises(ConnectionFailed, match="nobody there"):
        await follow(Logs())


async def test_patience_ends(autojump_clock: object) -> None:
    begun = trio.current_time()
    with pytest.raises(ConnectionFailed, match="nobody there"):
        await follow(Logs(), [lambda peer: peer.output(1, 5, b"abc")])
    assert PATIENCE_SECONDS <= trio.current_time() - begun <= PATIENCE_SECONDS + 10


async def test_output_that_the_next_service_has_goes_on_there(autojump_clock: object) -> None:
    def leave(peer: Peer) -> None:
        peer.output(1, 5, b"abc")
        peer.end(1, 8, name="shutting_down", message="cannot reach job 7")

    logs = Logs()
    seen, _, record = await follow(logs, [leave], [lambda peer: peer.end(1, 8)])
    assert (seen, record.state) == ([b"abc"], State.COMPLETED)
    assert logs.asked[1].offset == 8
