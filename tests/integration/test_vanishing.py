"""Followers that stop reading, vanish or come by the thousand: the service is as it was before.

With JOBWORKER_SOAK set ten thousand follows come and go each way, else a hundred.
"""

import base64
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService

from ..services import open_embedded
from .conftest import until
from .wire import Wire, open_socket, open_wire

FOLLOWS = 10_000 if os.environ.get("JOBWORKER_SOAK") else 100
AT_A_TIME = 10
FOLLOW = '{"jsonrpc": "2.0", "id": 1, "method": "job.log", "params": {"id": JOB}}'
MAX_GROWTH_BYTES = 32 << 20
"""Connections are cycles of objects, and some hundreds of them wait for the collection of garbage;
what grows by more than a few kilobytes a follow shows over the soak's ten thousand."""


def descriptors(service: EmbeddedService) -> int:
    return len(os.listdir(f"/proc/{service.process.pid}/fd"))


def memory_bytes(service: EmbeddedService) -> int:
    rollup = Path(f"/proc/{service.process.pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) << 10 for line in rollup.splitlines() if "Pss:" in line)


async def follow_and_close(service: EmbeddedService, job: int) -> None:
    async with open_wire(service) as wire:
        result = await wire.call("job.log", id=job)
        await wire.notes(result["subscription"]).receive()


async def follow_and_vanish(service: EmbeddedService, job: int) -> None:
    """Ask for output, and be gone without a word."""
    async with open_socket(service) as socket:
        await socket.send_message(FOLLOW.replace("JOB", str(job)))
        await trio.aclose_forcefully(socket._stream)


async def follow_and_unfollow(service: EmbeddedService, job: int) -> None:
    async with open_wire(service) as wire:
        for _ in range(3):
            result = await wire.call("job.log", id=job, delivery={"credit_bytes": 100})
            await wire.call("job.unfollow", subscription=result["subscription"])


@pytest.mark.parametrize("way", [follow_and_close, follow_and_vanish, follow_and_unfollow])
async def test_follows_that_came_and_went_leave_nothing(
    open_directory: Callable[[], Path], way: Callable[[EmbeddedService, int], Awaitable[None]]
) -> None:
    async with open_embedded(open_directory()) as service, open_wire(service) as admin:
        job = await admin.start("sh", "-c", "head -c 100000 /dev/zero; exec sleep 600")

        async def some(count: int) -> None:
            left = count

            async def one_after_another() -> None:
                nonlocal left
                while left > 0:
                    left -= 1
                    await way(service, job)

            async with trio.open_nursery() as nursery:
                for _ in range(AT_A_TIME):
                    nursery.start_soon(one_after_another)

        await some(AT_A_TIME * 2)  # what is made once and kept: caches, threads, arenas
        await until(lambda: descriptors(service) < 40)
        before, memory = descriptors(service), memory_bytes(service)
        await some(FOLLOWS)
        await until(lambda: descriptors(service) <= before)
        assert memory_bytes(service) - memory < MAX_GROWTH_BYTES
        assert "Traceback" not in service.log_text()
        await admin.call("job.stop", id=job)


async def test_followers_that_stop_reading_cost_little_and_hold_up_nobody(
    open_directory: Callable[[], Path],
) -> None:
    """Ten ask for the output of a job that writes 20 MB, on connections that nobody reads."""
    async with open_embedded(open_directory()) as service, open_wire(service) as admin:
        job = await admin.start("sh", "-c", "head -c 20000000 /dev/zero; exec sleep 600")
        await read_all(admin, job)  # what one reader takes is there in any case
        memory = memory_bytes(service)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(stall, service, job)
            await read_all(admin, job)
            growth = memory_bytes(service) - memory
            nursery.cancel_scope.cancel()
        assert growth < 10 * (3 << 20), "ten times the output would be 200 MB"
        await admin.call("job.stop", id=job)


async def read_all(admin: Wire, job: int) -> None:
    result = await admin.call("job.log", id=job, follow=True, delivery={})
    got = 0
    with trio.fail_after(60):
        async for note in admin.notes(result["subscription"]):
            got += size_of(note)
            if got == 20_000_000:
                break


async def stall(service: EmbeddedService, job: int) -> None:
    async with open_socket(service) as socket:
        await socket.send_message(FOLLOW.replace("JOB", str(job)))
        await trio.sleep_forever()


def size_of(note: object) -> int:
    assert isinstance(note, dict)
    return len(base64.b64decode(note["params"]["data"]))
