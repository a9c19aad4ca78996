"""The disk that holds everything fills at each step of a job's life.

State, output, jobs' disks and volumes stand on one small file system. Whatever step it is full at:
each end that was told is the one that the next service tells, no disk outlives its job, and jobs
start again as soon as there is room.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from jobworker.cli.embedded import Embedded, open_embedded

from .conftest import disks_in, disks_of_size, left_behind
from .outside import open_launcher, settings_with
from .test_full_disk import kill
from .test_lost_writes import WRITE, ended, filled, small_state, wait_in_job
from .wire import Json, Refused, Wire, open_wire

DISK_BYTES = (40 << 20) + 19 * 4096
"""Of a size that nobody else's disks have."""
LIMITS = {"disk_bytes": DISK_BYTES, "output_bytes": 0}
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "worker": {"keep_free": 0, "max_concurrent_jobs": 2, "on_disk_full": "discard-output"},
    "sandbox": {"disk_limit": 32, "spares": 1},
}
TOLD = ("state", "reason", "exit_code", "signal")


class Site:
    """A launcher, its services one after the other, and the disk below them."""

    def __init__(self, directory: Path, place: Path) -> None:
        self.directory, self.place = directory, place
        self.told: dict[int, Json] = {}
        """The ends that somebody was told of."""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[tuple[Embedded, Wire]]:
        extra = settings_with(self.directory, SETTINGS)
        async with open_embedded(self.directory, extra) as service, open_wire(service) as wire:
            yield service, wire

    async def fill(self) -> None:
        await trio.to_thread.run_sync(filled, self.place)

    def make_room(self) -> None:
        (self.place / "filler").unlink()

    async def end_of(self, wire: Wire, job: int) -> None:
        self.told[job] = await ended(wire, job)


async def before_the_start(site: Site, wire: Wire) -> None:
    await site.fill()
    with suppress(Refused):
        await site.end_of(wire, await wire.start("true", limits=LIMITS))


async def while_it_waits(site: Site, wire: Wire) -> None:
    running = [await wait_in_job(wire, "exit 3", limits=LIMITS) for _ in range(2)]
    waiting = await wire.start("true", limits=LIMITS)
    await site.fill()
    for job, go_on in running:
        go_on()
        await site.end_of(wire, job)
    await site.end_of(wire, waiting)


async def while_it_writes(site: Site, wire: Wire) -> None:
    job, go_on = await wait_in_job(wire, f"cd /workspace; {WRITE}; exit 0", limits=LIMITS)
    await site.fill()
    go_on()
    await site.end_of(wire, job)
    assert (site.told[job]["state"], site.told[job]["reason"]) == ("FAILED", "disk")


async def while_it_prints(site: Site, wire: Wire) -> None:
    job, go_on = await wait_in_job(wire, "head -c 9000000 /dev/zero; exit 5", limits=LIMITS)
    await site.fill()
    go_on()
    await site.end_of(wire, job)
    assert (site.told[job]["exit_code"], site.told[job]["output_cut"]) == (5, "disk")


async def with_a_volume(site: Site, wire: Wire) -> None:
    await wire.call("volume.create", name="thin", size_bytes=32 << 20, thin=True)
    script = "yes abcdefg | head -c 20000000 > /volumes/thin/x; exit 0"
    job, go_on = await wait_in_job(wire, script, limits=LIMITS, volumes=[{"name": "thin"}])
    await site.fill()
    go_on()
    await site.end_of(wire, job)
    assert (site.told[job]["state"], site.told[job]["reason"]) == ("FAILED", "disk")
    await wire.call("volume.remove", name="thin")


STEPS = [
    before_the_start,
    while_it_waits,
    while_it_writes,
    while_it_prints,
    with_a_volume,
]


async def no_disk_is_left() -> None:
    with trio.fail_after(20):
        while disks_of_size(DISK_BYTES):  # noqa: ASYNC110
            await trio.sleep(0.02)


async def starts_again(wire: Wire) -> None:
    with trio.fail_after(20):
        while True:
            with suppress(Refused):
                out, _, job = await wire.run("echo", "later", limits=LIMITS)
                assert (out, job["state"]) == ("later\n", "COMPLETED")
                return
            await trio.sleep(0.05)


async def check_told(site: Site, wire: Wire) -> None:
    for job, record in site.told.items():
        now = await ended(wire, job)
        assert {key: now[key] for key in TOLD} == {key: record[key] for key in TOLD}


@pytest.mark.parametrize("restart", [pytest.param("", marks=pytest.mark.soak), "on the full disk"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: str(step.__name__))
async def test_disk_is_full(
    open_directory: Callable[[], Path],
    step: Callable[[Site, Wire], Awaitable[None]],
    restart: str,
) -> None:
    directory = open_directory()
    async with small_state(directory) as place:
        below = disks_in(directory)
        with open_launcher(directory, SETTINGS):
            site = Site(directory, place)
            async with site.serving() as (service, wire):
                await step(site, wire)
                await no_disk_is_left()
                if restart:
                    await kill(service)
                else:
                    site.make_room()
                    await starts_again(wire)
                    await check_told(site, wire)
            async with site.serving() as (_, wire):
                await check_told(site, wire)
                if restart:
                    site.make_room()
                await starts_again(wire)
                await no_disk_is_left()
        assert left_behind(directory) == below
