"""The disk that holds everything fills at each step of a job's life.

State, output, jobs' disks and volumes stand on one small file system. Whatever step it is full at:
each end that was told is the one that the next service tells, no disk outlives its job, and jobs
start again as soon as there is room.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.server.host.disk_promises import free_bytes

from ..services import open_embedded
from .conftest import disks_in, disks_of_size, left_behind, size_of_this_run, until
from .outside import open_launcher, settings_with
from .test_full_disk import kill, told, until_stored
from .test_lost_writes import WRITE, ended, filled, hold, small_state
from .wire import Json, Refused, Wire, open_wire

DISK_BYTES = size_of_this_run(40)
"""Of a size that nobody else's disks have."""
LIMITS = {"disk_bytes": DISK_BYTES, "output_bytes": 0}
Settings = Mapping[str, Mapping[str, object]]
SETTINGS: Settings = {
    "worker": {"keep_free": 0, "max_concurrent_jobs": 2, "on_disk_full": "discard-output"},
    "sandbox": {"disk_limit": 32, "spares": 1},
}
TOLD = ("state", "reason", "exit_code", "signal")


class Site:
    """A launcher, its services one after the other, and the disk below them."""

    def __init__(self, directory: Path, place: Path, settings: Settings = SETTINGS) -> None:
        self.directory, self.place, self.settings = directory, place, settings
        self.told: dict[int, Json] = {}
        """The ends that somebody was told of."""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[tuple[EmbeddedService, Wire]]:
        extra = settings_with(self.directory, self.settings)
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
    running = [await hold(wire, "exit 3", limits=LIMITS) for _ in range(2)]
    waiting = await wire.start("true", limits=LIMITS)
    await site.fill()
    for job in running:
        job.let_go()
        await site.end_of(wire, job.id)
    await site.end_of(wire, waiting)


async def while_it_writes(site: Site, wire: Wire) -> None:
    job = await hold(wire, f"cd /workspace; {WRITE}; exit 0", limits=LIMITS)
    await site.fill()
    job.let_go()
    await site.end_of(wire, job.id)
    assert (site.told[job.id]["state"], site.told[job.id]["reason"]) == ("FAILED", "disk")


async def while_it_prints(site: Site, wire: Wire) -> None:
    job = await hold(wire, "head -c 9000000 /dev/zero; exit 5", limits=LIMITS)
    await site.fill()
    job.let_go()
    await site.end_of(wire, job.id)
    assert (site.told[job.id]["exit_code"], site.told[job.id]["output_cut"]) == (5, "disk")


async def with_a_volume(site: Site, wire: Wire) -> None:
    await wire.call("volume.create", name="thin", size_bytes=32 << 20, thin=True)
    script = "yes abcdefg | head -c 20000000 > /volumes/thin/x; exit 0"
    job = await hold(wire, script, limits=LIMITS, volumes=[{"name": "thin"}])
    await site.fill()
    job.let_go()
    await site.end_of(wire, job.id)
    assert (site.told[job.id]["state"], site.told[job.id]["reason"]) == ("FAILED", "disk")
    await wire.call("volume.remove", name="thin")


STEPS = [
    before_the_start,
    while_it_waits,
    while_it_writes,
    while_it_prints,
    with_a_volume,
]


async def no_disk_is_left(size: int = DISK_BYTES) -> None:
    with trio.fail_after(20):
        while disks_of_size(size):  # noqa: ASYNC110
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


# --- two jobs that fill it together, each within its limit ---------------------------------------

TOGETHER: Settings = {
    "worker": {"keep_free": 16, "max_concurrent_jobs": 2, "on_disk_full": "discard-output"},
    "sandbox": {"disk_limit": 128, "spares": 1},
}
HALF_BYTES = size_of_this_run(128)
SCRIPT = """
pause() { until test -e /dev/shm/$1; do sleep 0.05; done; }
echo begins; pause write
yes abcdefg | head -c 115343360 > /workspace/x; sync; touch /dev/shm/written
pause end; echo ends; exit 0
"""


class Writer:
    """A job that is told when to write its part, which is half of the disk, and when to end."""

    def __init__(self) -> None:
        self.marker, self.job = os.urandom(8).hex(), 0

    async def start(self, wire: Wire) -> None:
        command = ("sh", "-c", SCRIPT, self.marker)
        self.job = await wire.start(*command, limits={"disk_bytes": HALF_BYTES})

    def shared(self) -> Iterator[Path]:
        """Its /dev/shm, as the host sees it."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.marker.encode() in (process / "cmdline").read_bytes():
                    yield process / "root/dev/shm"

    def tell(self, name: str) -> None:
        for place in self.shared():
            with suppress(OSError):  # a child that has just ended
                (place / name).touch()

    async def write(self) -> None:
        self.tell("write")
        await until(lambda: any((place / "written").exists() for place in self.shared()), 60)


@pytest.mark.parametrize("restart", ["", "on the full disk"])
async def test_two_jobs_that_fill_it_together_end_as_they_did(
    open_directory: Callable[[], Path], restart: str
) -> None:
    directory = open_directory()
    first, second = Writer(), Writer()
    async with small_state(directory) as place:
        with open_launcher(directory, TOGETHER):
            site = Site(directory, place, TOGETHER)
            async with site.serving() as (service, wire):
                for each in (first, second):
                    await each.start(wire)
                for each in (first, second):
                    await each.write()
                assert free_bytes(place) < 1 << 20
                if not restart:
                    await they_end(site, wire, first, second)
                await kill(service)
            if restart:
                async with site.serving() as (service, wire):
                    await they_end(site, wire, first, second)
                    await kill(service)
            async with site.serving() as (_, wire):
                for job, record in site.told.items():
                    assert told(await wire.call("job.status", id=job)) == told(record)
                await starts_again(wire)


async def they_end(site: Site, wire: Wire, first: Writer, second: Writer) -> None:
    """The one that has lost something ends first, on the full disk."""
    second.tell("end")
    await site.end_of(wire, second.job)
    lost = site.told[second.job]
    assert (lost["state"], lost["reason"], lost["exit_code"]) == ("FAILED", "disk", 0)
    assert "its disk is lost" in str(lost["detail"])
    first.tell("end")
    await site.end_of(wire, first.job)
    whole = site.told[first.job]
    assert (whole["state"], whole["exit_code"]) == ("COMPLETED", 0)
    assert "is lost" not in str(whole["detail"])
    await until_stored(
        site.place / "service",
        {job: (str(record["state"]), False) for job, record in site.told.items()},
    )
    await no_disk_is_left(HALF_BYTES)
    await starts_again(wire)
