"""A job's output as it arrives: credit, order, end and errors."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from jobworker.client.following import WINDOW_BYTES
from jobworker.errors import (
    NotFound,
)
from jobworker.protocol import messages as m

from .memory_servers import RECORD, connected, opened


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
        with pytest.raises(NotFound, match="it is gone"):
            await anext(output)
        with pytest.raises(StopAsyncIteration):
            await anext(output)
