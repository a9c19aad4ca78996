"""A job's output as it arrives: credit, order, end and errors."""

import gc
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from jobworker.client.following import WINDOW_BYTES, Following, Inbox
from jobworker.errors import ConnectionFailed, InternalError, NotFound
from jobworker.model.job import Stream
from jobworker.protocol import messages as m
from jobworker.protocol.session import Output

from .memory_servers import NOW, RECORD, connected, opened


async def test_slow_consumer_delays_no_reply_and_is_granted_what_it_takes() -> None:
    async with connected() as (client, peer):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                call = await peer.call()
                assert isinstance(call.params, m.LogParams)
                assert call.params.delivery.encoding is m.Encoding.BINARY
                assert call.params.delivery.credit_bytes == WINDOW_BYTES
                peer.reply(call, m.LogResult(subscription=3, offset=0))

            nursery.start_soon(serve)
            output = await opened(client)
        piece = WINDOW_BYTES // 8
        for number in range(8):
            peer.output(3, number * piece, bytes(piece))
        async with trio.open_nursery() as nursery:  # nothing is taken yet, and a call passes
            nursery.start_soon(client.job(7).status)
            peer.reply(await peer.call(), RECORD)
        for _ in range(8):
            await anext(output)
        await wait_all_tasks_blocked()
        granted = 0
        while peer.sent.statistics().current_buffer_used:
            call = await peer.call()
            assert isinstance(call.params, m.CreditParams)
            granted += call.params.bytes
        # What was handed out last is not taken yet.
        assert WINDOW_BYTES // 2 <= granted < WINDOW_BYTES
        output.close()
        assert (await peer.call()).method.name == "job.unfollow"


async def test_what_has_come_can_be_taken_at_once_and_is_granted_anew() -> None:
    async with connected() as (client, peer):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                peer.reply(await peer.call(), m.LogResult(subscription=3, offset=0))

            nursery.start_soon(serve)
            output = await opened(client)
        assert output.receive_nowait() is None
        piece = WINDOW_BYTES // 8
        for number in range(7):
            peer.output(3, number * piece, bytes([number]) * piece)
        peer.end(3, 7 * piece)
        await wait_all_tasks_blocked()
        seen = [await anext(output)]
        while (chunk := output.receive_nowait()) is not None:
            seen.append(chunk)
        assert [chunk.data[0] for chunk in seen] == list(range(7))
        assert output.offset == 7 * piece
        assert output.record is None
        with pytest.raises(StopAsyncIteration):
            await anext(output)
        assert output.record is not None
        call = await peer.call()
        assert call.params == m.CreditParams(subscription=3, bytes=WINDOW_BYTES // 2)
        output.close()
        assert output.receive_nowait() is None


async def test_output_that_the_server_could_not_send_raises_after_what_came() -> None:
    async with connected() as (client, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))
            peer.output(1, 0, b"abc")
            peer.end(1, 3, name="not_found", message="cannot read the output: it is gone")

        nursery.start_soon(serve)
        output = await opened(client)
        assert (await anext(output)).data == b"abc"
        for _ in range(2):  # output that was cut is not told as whole the second time
            with pytest.raises(NotFound, match="it is gone"):
                await anext(output)


# --- a followed output by itself ------------------------------------------------------------


class Followed:
    """A subscription, and what it tells the connection."""

    def __init__(self, **fields: Any) -> None:
        self.inbox = Inbox.make()
        self.told = list[object]()
        self.output = Following(
            inbox=self.inbox,
            grant=lambda count: self.told.append(("grant", count)),
            forget=lambda ended: self.told.append(("forget", ended)),
            drop=lambda: self.told.append("drop"),
            **fields,
        )

    def come(self, data: bytes, offset: int = 0, stream: Stream = Stream.STDOUT) -> None:
        header = m.OutputHeader(subscription=1, stream=stream, offset=offset, time=NOW)
        self.inbox.put(Output(header, data))

    def end(self, offset: int = 0, **error: str) -> None:
        end = m.OutputEnd(subscription=1, offset=offset, job=RECORD, error=error or None)
        self.inbox.put(end)


async def test_open_subscription_is_forgotten_once() -> None:
    followed = Followed()
    followed.output.close()
    followed.output.close()
    assert followed.told == [("forget", False)]
    followed.come(b"late")
    assert followed.output.receive_nowait() is None
    del followed.output
    gc.collect()
    assert followed.told == [("forget", False)]


async def test_ended_subscription_needs_no_goodbye() -> None:
    followed = Followed()
    followed.end(5)
    with pytest.raises(StopAsyncIteration):
        await anext(followed.output)
    assert (followed.output.offset, followed.output.record) == (5, RECORD)
    followed.output.close()
    assert followed.told == [("forget", True)]


@pytest.mark.parametrize("ended", [False, True])
async def test_output_that_is_dropped_is_marked_unless_it_has_ended(*, ended: bool) -> None:
    followed = Followed()
    if ended:
        followed.end()
        with pytest.raises(StopAsyncIteration):
            await anext(followed.output)
    del followed.output
    gc.collect()
    assert followed.told == ([] if ended else ["drop"])


async def test_error_of_the_connection_is_raised_at_each_call_as_a_copy() -> None:
    followed, lost = Followed(), ConnectionFailed("it broke", remedy="again", data={"a": 1})
    followed.inbox.put(lost)
    for _ in range(2):
        assert followed.output.receive_nowait() is None
        with pytest.raises(ConnectionFailed) as raised:
            await anext(followed.output)
        assert raised.value is not lost
        assert (str(raised.value), raised.value.data) == (str(lost), {"a": 1})


async def test_chunk_that_was_read_ahead_comes_first() -> None:
    followed = Followed()
    followed.end(3)
    assert followed.output.receive_nowait() is None
    with pytest.raises(StopAsyncIteration):
        await anext(followed.output)


async def test_start_of_a_stream_is_kept_until_its_first_chunk() -> None:
    starts = tuple(m.StreamStart(stream=stream, offset=3) for stream in Stream)
    followed = Followed(starts=starts)
    followed.come(b"abc", 5, Stream.STDERR)
    assert (await anext(followed.output)).stream is Stream.STDERR
    assert followed.output.offset == 8
    assert [start.stream for start in followed.output.starts] == [Stream.STDOUT]


async def test_unknown_error_of_the_server_is_an_internal_one() -> None:
    followed = Followed()
    followed.end(3, name="of a later version", message="cannot go on")
    with pytest.raises(InternalError, match="cannot go on"):
        await anext(followed.output)
