"""Subscriptions: how much is sent at once, and what one keeps until its end."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from jobworker.errors import InvalidParams, TooManyFollows
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import JobId, JobRecord, Stream
from jobworker.protocol.frames import PIECE_BYTES, Frame
from jobworker.protocol.messages import Delivery, Encoding
from jobworker.server.delivery.subscriptions import SLOW_SECONDS, Subscription, Subscriptions
from jobworker.server.fairness.fair_scheduling import ActiveClients
from jobworker.server.fairness.send_budget import FRAME_BYTES, LEAST_BYTES, SendBudget
from jobworker.server.fairness.wait_quota import WaitQuota

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


class OneJob:
    """What a subscription asks the supervisor for, where all jobs have ended."""

    async def wait(self, job: JobId, _: str) -> JobRecord:
        """Its record."""
        return record(job)

    async def record(self, job: JobId, _: str) -> JobRecord:
        """Its record."""
        return record(job)

    def is_being_removed(self, _: JobId) -> bool:
        """Never."""
        return False


@pytest.mark.parametrize("until", [0, None], ids=["end", "output"])
async def test_cancelled_subscription_keeps_its_place_until_its_message_is_sent(
    tmp_path: Path, until: int | None
) -> None:
    """Else a client that reads next to nothing could have any number of messages in memory."""
    spool, taken = Spool.create(tmp_path / "job"), trio.Event()
    read, write = os.pipe()
    os.write(write, b"said")
    spool.append_from_pipe(Stream.STDOUT, read, 4)
    os.close(write)
    os.close(read)

    async def send_slowly(_: str | Sequence[Frame]) -> None:
        with trio.CancelScope(shield=True):  # as a conversation does: messages are sent whole
            await taken.wait()
        await trio.lowlevel.checkpoint_if_cancelled()

    waits = WaitQuota(2)
    opened = Subscriptions(
        cast(Supervisor, OneJob()), SendBudget(ActiveClients()), 60.0, 1, waits, "alice"
    )
    number = opened.open(record(1), spool.follow(), Delivery(), until).number
    async with trio.open_nursery() as nursery:
        nursery.start_soon(opened.run, number, send_slowly)
        await wait_all_tasks_blocked()
        opened.cancel(number)
        await wait_all_tasks_blocked()
        try:
            with pytest.raises(TooManyFollows):
                opened.check_room()
            with pytest.raises(InvalidParams):
                opened.find(number)
        finally:
            taken.set()
    opened.check_room()
    with waits.waiting("alice"), waits.waiting("alice"):
        pass
    spool.close()


async def test_cancelled_subscription_that_sends_nothing_gives_its_place_up_at_once(
    tmp_path: Path,
) -> None:
    spool = Spool.create(tmp_path / "job")

    async def never(_: str | Sequence[Frame]) -> None:
        raise AssertionError("there is nothing to send")

    opened = Subscriptions(
        cast(Supervisor, OneJob()), SendBudget(ActiveClients()), 60.0, 1, WaitQuota(2), "alice"
    )
    number = opened.open(record(1), spool.follow(), Delivery(), None).number
    async with trio.open_nursery() as nursery:
        nursery.start_soon(opened.run, number, never)
        await wait_all_tasks_blocked()
        opened.cancel(number)
        opened.check_room()
    spool.close()
