"""A subscription: how much is sent at once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.jobs.output.spool import Spool
from jobworker.model.job import Stream
from jobworker.protocol.frames import PIECE_BYTES
from jobworker.protocol.messages import Encoding
from jobworker.server.delivery.subscriptions import SLOW_SECONDS, Subscription
from jobworker.server.fairness.send_budget import FRAME_BYTES, LEAST_BYTES

from ...strategies import record

BATCHES = [LEAST_BYTES << doubled for doubled in range(5)]
assert BATCHES[-1] == PIECE_BYTES


@pytest.fixture
def subscription(tmp_path: Path) -> Iterator[Subscription]:
    """One whose job has written 8 bytes at a time, to its two streams by turns."""
    spool = Spool.create(tmp_path / "job")
    read, write = os.pipe()
    for number in range(sum(BATCHES) // FRAME_BYTES + 200):
        os.write(write, b"%07d\n" % number)
        spool.append_from_pipe((Stream.STDOUT, Stream.STDERR)[number % 2], read, 8)
    os.close(write)
    os.close(read)
    with spool.follow() as follower:
        yield Subscription(
            number=1,
            record=record(1),
            follower=follower,
            encoding=Encoding.BINARY,
            until=None,
            credit=None,
        )
    spool.close()


async def send(subscription: Subscription, seconds: float = 0) -> int:
    """How many messages are sent at once."""
    frames, cost = await subscription.next_messages(await subscription.room(1))
    subscription.keep_pace(cost, seconds)
    return len(frames)


async def test_small_pieces_get_more_at_once_as_long_as_they_are_taken_fast(
    subscription: Subscription,
) -> None:
    fast = [await send(subscription) for _ in BATCHES]
    assert fast == [size // FRAME_BYTES for size in BATCHES]
    slow = [await send(subscription, 2 * SLOW_SECONDS) for _ in range(2)]
    assert slow == [fast[-1], fast[-2]]
