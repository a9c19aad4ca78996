"""A follower: it reads a log at its own pace, and is woken when there is more."""

import pytest
import trio
import trio.testing

from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.spool import Spool

from .written_logs import OUT, append, everything, joined, no_descriptor_leaks, spool

__all__ = ["no_descriptor_leaks", "spool"]


async def test_idle_follower_is_woken_and_busy_one_is_not_poked(spool: Spool) -> None:
    got: list[bytes] = []

    async def follow(follower: Follower) -> None:
        got.extend([bytes(chunk.data) async for chunk in follower])

    with spool.follow() as follower, spool.follow() as stalled:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow, follower)
            await trio.testing.wait_all_tasks_blocked()
            assert spool.statistics().idle_followers == 1
            await spool.write(lambda: append(spool, OUT, b"now"))
            await trio.testing.wait_all_tasks_blocked()
            assert follower.offset == 3
            await spool.seal()
        assert got == [b"now"]
        assert spool.statistics().idle_followers == 0
        assert stalled.offset == 0
        assert joined(await everything(stalled)) == b"now"


async def test_cancelled_receive_loses_nothing_and_is_forgotten(spool: Spool) -> None:
    with spool.follow() as follower:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.receive)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert spool.statistics().idle_followers == 0
        append(spool, OUT, b"after")
        spool.wake()
        with trio.CancelScope() as scope:
            scope.cancel()
            await follower.receive()
        assert scope.cancelled_caught
        chunk = await follower.receive()
        assert chunk is not None
        assert chunk.data == b"after"
    assert spool.statistics().followers == 0


async def test_closing_a_follower_ends_its_wait(spool: Spool) -> None:
    follower = spool.follow()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await follower.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        follower.close()
        follower.close()
        statistics = spool.statistics()
        assert (statistics.followers, statistics.idle_followers) == (0, 0)
        spool.wake()  # before the waiting task could run: it must not poke the closed one


async def test_second_task_at_a_follower_is_refused(spool: Spool) -> None:
    with spool.follow() as follower:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.receive)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await follower.receive()
            nursery.cancel_scope.cancel()
