"""The service is restarted while many jobs end: each byte once and in order, each end as it was.

JOBWORKER_SOAK=1 (`make soak`) makes it two hundred rounds of each kind. JOBWORKER_SEED repeats one.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from jobworker.client.client import Client
from jobworker.model.job import JobId, JobSpec, Stream
from jobworker.model.lifecycle import Reason, State

from ..integration.conftest import _needs_root, left_behind, open_directory
from .restarting import Site, open_site

__all__ = ["_needs_root", "open_directory"]

SOAK = bool(os.environ.get("JOBWORKER_SOAK"))
ROUNDS = 200 if SOAK else 1
JOBS = 60
BYTES = 900_000
"""Less than a pipe holds: all of it may stand there when the service goes."""
EXTRA: dict[str, dict[str, object]] = {
    "worker": {"max_concurrent_jobs": 64, "job_timeout": "10m"},
    "sandbox": {"disk_limit": 16, "spares": 8},
}
LINE = 10


def script(delay: float) -> str:
    """Print `BYTES` of numbered lines to each stream after a while, and end with 3."""
    count = BYTES // LINE
    return f"sleep {delay:.2f}; seq -f %09.0f 1 {count} >&2 & seq -f %09.0f 1 {count}; wait; exit 3"


def expected() -> bytes:
    return b"".join(b"%09d\n" % number for number in range(1, BYTES // LINE + 1))


async def start(client: Client, delay: float) -> JobId:
    return (await client.run(JobSpec(command=("sh", "-c", script(delay))))).id


async def check(client: Client, job: JobId, whole: bytes) -> None:
    """The end and every byte of a job, by whatever services saw to it."""
    record = await client.job(job).wait()
    assert (record.state, record.reason, record.exit_code) == (State.FAILED, Reason.EXIT, 3), record
    assert (record.stdout_bytes, record.stderr_bytes) == (BYTES, BYTES), record
    assert (record.discarded_bytes, record.output_cut, record.detail) == (0, None, ""), record
    data = {stream: bytearray() for stream in Stream}
    async for chunk in client.job(job).output():
        data[chunk.stream] += chunk.data
    assert data[Stream.STDOUT] == whole
    assert data[Stream.STDERR] == whole


async def restart(site: Site, how: str) -> None:
    """End the service by one of the two signals, and start the next one."""
    if how == "SIGTERM":
        await site.end()
    else:
        await site.kill()
    site.start()
    await site.until_ready()


@pytest.mark.timeout(7200 if SOAK else 240)
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
async def test_restarted_while_jobs_end_nothing_is_lost(
    open_directory: Callable[[], Path], how: str
) -> None:
    usual = random.SystemRandom().randrange(1 << 30) if SOAK else 1
    seed = int(os.environ.get("JOBWORKER_SEED", usual))
    print(f"JOBWORKER_SEED={seed}")  # noqa: T201 - shown where it fails
    dice, whole, directory = random.Random(seed), expected(), open_directory()
    with open_site(directory, EXTRA) as site:
        site.start()
        await site.until_ready()
        for _ in range(ROUNDS):
            async with site.client() as client:
                span = dice.uniform(0.2, 1.5)
                jobs = [await start(client, dice.uniform(0, span)) for _ in range(JOBS)]
                await trio.sleep(dice.uniform(0, span / 2))
                await restart(site, how)
                if dice.random() < 0.5:
                    await restart(site, how)
                limit = trio.CapacityLimiter(8)
                async with trio.open_nursery() as nursery:
                    for job in jobs:
                        nursery.start_soon(_checked, client, job, whole, limit)
                for job in jobs:
                    await client.job(job).remove()
        await site.end()
    assert left_behind(directory) == []


async def _checked(client: Client, job: JobId, whole: bytes, limit: trio.CapacityLimiter) -> None:
    async with limit:
        await check(client, job, whole)
