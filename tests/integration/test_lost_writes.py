"""A disk below jobs' disks and volumes that fills: nothing that was lost ends as COMPLETED.

All that the service keeps stands on a small file system, which the test fills to its last block
while jobs write.
"""

import errno
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest
import trio
from attrs import frozen

from jobworker.model.job import JobRecord, shell_exit_code
from jobworker.sandbox import channel
from jobworker.sandbox.service.launch import OpenedLauncher
from jobworker.serialization.convert import structure
from jobworker.server.host.disk_promises import free_bytes

from ..services import open_embedded
from .conftest import until
from .outside import open_launcher
from .test_full_disk import fill
from .test_outside_launcher import ORDER, ask, connect, spawn
from .wire import Json, Refused, Wire, open_wire

Directory = Callable[[], Path]
MIB = 1 << 20
DISK_BYTES = 224 * MIB
SMALL: Mapping[str, Mapping[str, object]] = {
    "worker": {"keep_free": 0, "max_concurrent_jobs": 4},
    "sandbox": {"disk_limit": 48, "spares": 1},
}
RESERVED: Mapping[str, Mapping[str, object]] = {
    "worker": {"keep_free": 0, "max_concurrent_jobs": 4},
    "sandbox": {"disk_limit": 48, "spares": 0, "overcommit_disk": False},
}
WRITE = "yes abcdefg | head -c 33554432 > x; sync; echo wrote"


@asynccontextmanager
async def small_state(directory: Path) -> AsyncIterator[Path]:
    """A state directory that is a file system of its own."""
    image, place = directory / "small.img", directory / "state"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    await trio.run_process(["mkfs.ext4", "-q", "-m0", "-b4096", image])
    await trio.run_process(["mount", "-o", "loop", image, place])
    try:
        place.chmod(0o755)
        yield place
    finally:
        with trio.CancelScope(shield=True):
            await unmount(place)
            image.unlink()


@asynccontextmanager
async def small_host(
    directory: Path, extra: Mapping[str, Mapping[str, object]] = SMALL
) -> AsyncIterator[tuple[Path, Wire]]:
    """A service on such a state directory: that, and a connection."""
    async with (
        small_state(directory) as place,
        open_embedded(directory, extra) as service,
        open_wire(service) as wire,
    ):
        yield place, wire


async def unmount(place: Path) -> None:
    """Unmount, once the last device before a file there is gone."""
    with trio.fail_after(30):
        while (await trio.run_process(["umount", place], check=False)).returncode:  # noqa: ASYNC110
            await trio.sleep(0.05)


def filled(place: Path) -> None:
    """Take the last blocks below, those of the service's own files aside."""
    with suppress(FileNotFoundError):
        (place / "filler").unlink()
    fill(place)


@frozen
class Held:
    """A job whose script stops in places, until a file of that name is in its /dev/shm."""

    id: int
    marker: str

    def let_go(self, place: str = "begin") -> None:
        """Have the script go on from this place."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.marker.encode() in (process / "cmdline").read_bytes():
                    (process / "root/dev/shm" / place).touch()


def stop_until(place: str) -> str:
    return f"until test -e /dev/shm/{place}; do sleep 0.05; done"


async def hold(wire: Wire, script: str, **spec: object) -> Held:
    """Start a script that stops at its beginning."""
    marker = f"go-{os.urandom(8).hex()}"
    whole = f": {marker}; echo; {stop_until('begin')}; {script}"
    result = await wire.call("job.run", job={"command": ["sh", "-c", whole], **spec}, follow={})
    job = result["job"]
    assert isinstance(job, dict)
    await wire.notes(result["subscription"]).receive()
    return Held(id=int(job["id"]), marker=marker)


async def ended(wire: Wire, job: int) -> Json:
    with trio.fail_after(60):
        return await wire.call("job.wait", id=job)


async def test_job_whose_disk_lost_writes_is_not_completed(open_directory: Directory) -> None:
    async with small_host(open_directory()) as (place, wire):
        job = await hold(wire, f"cd /workspace; {WRITE}; rm x; exit 0")
        failing = await hold(wire, f"cd /workspace; {WRITE}; exit 3")
        await trio.to_thread.run_sync(filled, place)
        job.let_go()
        record = await ended(wire, job.id)
        assert (record["state"], record["reason"], record["exit_code"]) == ("FAILED", "disk", 0)
        assert "its disk is lost" in str(record["detail"])
        assert shell_exit_code(structure(JobRecord, record)) == 74
        failing.let_go()
        record = await ended(wire, failing.id)
        assert (record["state"], record["reason"], record["exit_code"]) == ("FAILED", "exit", 3)
        assert "its disk is lost" in str(record["detail"])


async def first_start_that_succeeds(wire: Wire) -> tuple[str, object]:
    """Run a job as soon as what others had on the disk below is free."""
    with trio.fail_after(20):
        while True:
            with suppress(Refused):
                text, _, record = await wire.run("echo", "later", limits={"disk_bytes": 128 * MIB})
                return text, record["state"]
            await trio.sleep(0.05)


def remove(link: OpenedLauncher, job: int) -> None:
    """Have the launcher forget a job; its place is free then."""
    assert "ok" in ask(link.sock, "remove", job)[0]


def spares_fail(link: OpenedLauncher, job: int) -> bool:
    """Ask for two jobs on a full disk: the spare's disk is lost, and nothing makes another.

    The kernel may have written the spare's disk back while there was room: then the first
    one runs, and what comes after it is not a spare that lost anything.
    """
    reply, made = ask(link.sock, "spawn", job, **{**ORDER, "arguments": ["true"]})
    if "ok" in reply:
        channel.close_all(made)
        remove(link, job)
        return False
    again, _ = ask(link.sock, "spawn", job + 1, **{**ORDER, "arguments": ["true"]})
    for each in (reply, again):
        problem = each["error"]
        assert isinstance(problem, dict)
        assert (problem["step"], problem["errno"]) == ("mount-disk", errno.ENOSPC)
    return True


async def test_spare_whose_disk_lost_writes_becomes_no_job(open_directory: Directory) -> None:
    directory = open_directory()
    async with small_state(directory) as place:
        with open_launcher(directory, SMALL), closing(connect(directory)) as link:
            for job in range(1, 30, 3):
                channel.close_all(spawn(link.sock, job, "true"))
                await trio.to_thread.run_sync(filled, place)
                os.sync()
                if spares_fail(link, job + 1):
                    break
                remove(link, job)
                (place / "filler").unlink()
            else:
                pytest.fail("ten spares in a row were written back before the disk was full")
            (place / "filler").unlink()
            channel.close_all(spawn(link.sock, 40, "true"))


async def test_status_tells_what_the_host_cannot_cover(open_directory: Directory) -> None:
    async with small_host(open_directory()) as (place, wire):
        job = await wire.start("sleep", "600")

        async def warned(wanted: bool) -> list[str]:
            with trio.fail_after(20):
                while True:
                    record = await wire.call("job.status", id=job)
                    warnings = record["warnings"]
                    assert isinstance(warnings, list)
                    if bool(warnings) == wanted:
                        return warnings
                    await trio.sleep(0.1)

        await warned(False)
        await trio.to_thread.run_sync(filled, place)
        (warning,) = await warned(True)
        assert "a job whose writes are lost is FAILED" in warning
        (place / "filler").unlink()
        await warned(False)
        await wire.call("job.stop", id=job, signal="KILL")
        assert (await wire.call("job.status", id=job))["warnings"] == []


async def until_written(wire: Wire, job: int) -> None:
    """Wait for the line that a script writes behind its sync(1)."""
    with trio.fail_after(60):
        while (await wire.call("job.status", id=job))["stdout_bytes"] != len("\nwrote\n"):  # noqa: ASYNC110
            await trio.sleep(0.05)


async def test_two_jobs_that_fill_the_disk_below_end_and_the_next_one_starts(
    open_directory: Directory,
) -> None:
    """Each within its limit, together more than there is: no end is lost, and no start refused."""
    async with small_host(open_directory()) as (_, wire):
        write = f"cd /workspace; yes abcdefg | head -c {110 * MIB} > x; sync; echo wrote"
        script = f"{write}; {stop_until('both')}; cksum < x; exit 0"
        jobs = [await hold(wire, script, limits={"disk_bytes": 128 * MIB}) for _ in range(2)]
        for job in jobs:
            job.let_go()
        for job in jobs:
            await until_written(wire, job.id)
        for job in jobs:
            job.let_go("both")
        records = [await ended(wire, job.id) for job in jobs]
        outcomes = {(record["state"], record["reason"]) for record in records}
        assert ("FAILED", "disk") in outcomes
        assert outcomes <= {("FAILED", "disk"), ("COMPLETED", None)}
        text, state = await first_start_that_succeeds(wire)
        assert (text, state) == ("later\n", "COMPLETED")
        for record in records:
            assert (await wire.call("job.status", id=record["id"]))["state"] == record["state"]


async def test_reserved_volume_takes_what_it_promised_on_a_full_disk(
    open_directory: Directory,
) -> None:
    async with small_host(open_directory(), RESERVED) as (place, wire):
        await wire.call("volume.create", name="kept", size_bytes=64 * MIB)
        image = place / "volumes" / "kept.img"
        assert image.stat().st_blocks * 512 >= 64 * MIB
        volumes = [{"name": "kept"}]
        # The kernel zeroes what a file reserves by punching it out of the image below.
        script = "cd /volumes/kept; for n in 1 2 3; do fallocate -l 1M $n; echo x > $n; done; sync"
        job = await hold(wire, script, volumes=volumes)
        job.let_go()
        assert (await ended(wire, job.id))["state"] == "COMPLETED"
        script = f"cd /volumes/kept; {WRITE}; rm ?; {WRITE}; cksum < x"
        job = await hold(wire, script, volumes=volumes)
        assert image.stat().st_blocks * 512 >= 64 * MIB, "what was punched out is taken again"
        await trio.to_thread.run_sync(filled, place)
        job.let_go()
        record = await ended(wire, job.id)
        assert (record["state"], record["detail"]) == ("COMPLETED", "")
        (place / "filler").unlink()
        script = "yes abcdefg | head -c 33554432 | cmp - /volumes/kept/x && echo same"
        assert (await wire.run("sh", "-c", script, volumes=volumes))[0] == "same\n"
        assert image.stat().st_blocks * 512 >= 64 * MIB


async def test_job_whose_thin_volume_lost_writes_is_not_completed(
    open_directory: Directory,
) -> None:
    async with small_host(open_directory()) as (place, wire):
        await wire.call("volume.create", name="thin", size_bytes=64 * MIB, thin=True)
        assert (place / "volumes" / "thin.img").stat().st_blocks * 512 < 16 * MIB
        listed = (await wire.call("volume.list"))["volumes"]
        assert isinstance(listed, list)
        assert [(volume["name"], volume["thin"]) for volume in listed] == [("thin", True)]
        # The kernel would write this out long after the job has ended.
        script = "cd /volumes/thin; yes abcdefg | head -c 33554432 > x; echo wrote; exit 0"
        job = await hold(wire, script, volumes=[{"name": "thin"}])
        await trio.to_thread.run_sync(filled, place)
        job.let_go()
        record = await ended(wire, job.id)
        assert (record["state"], record["reason"]) == ("FAILED", "disk")
        assert "the volume thin is lost" in str(record["detail"])
        (place / "filler").unlink()
        out, _, record = await wire.run("echo", "later")
        assert (out, record["state"]) == ("later\n", "COMPLETED")


async def test_output_leaves_room_for_what_live_jobs_may_still_write(
    open_directory: Directory,
) -> None:
    covered: Mapping[str, Mapping[str, object]] = {
        "worker": {"keep_free": 16, "max_concurrent_jobs": 2, "on_disk_full": "discard-output"},
        "sandbox": {"disk_limit": 48, "spares": 1},
    }
    async with small_host(open_directory(), covered) as (place, wire):
        writer = await hold(wire, f"cd /workspace; {WRITE}; exit 0")
        script = "for n in $(seq 200); do head -c 1048576 /dev/zero; sleep 0.05; done"
        talker = await wire.start("sh", "-c", script, limits={"output_bytes": 0})
        record = await ended(wire, talker)
        assert (record["state"], record["output_cut"]) == ("COMPLETED", "disk")
        assert isinstance(record["stdout_bytes"], int)
        assert record["stdout_bytes"] > 8 * MIB
        writer.let_go()
        assert (await ended(wire, writer.id))["state"] == "COMPLETED"
        free = os.statvfs(place)
        assert free.f_bavail * free.f_frsize >= 16 * MIB


async def test_large_disks_take_no_output_away_that_the_settings_leave(
    open_directory: Directory,
) -> None:
    """Two jobs that ask for more disk than there is must not cost all others their output."""
    usual: Mapping[str, Mapping[str, object]] = {
        "worker": {"keep_free": 16, "max_concurrent_jobs": 3, "on_disk_full": "discard-output"},
        "sandbox": {"disk_limit": 16, "spares": 0},
    }
    async with small_host(open_directory(), usual) as (place, wire):
        for _ in range(2):
            await wire.start("sleep", "600", limits={"disk_bytes": 128 * MIB})
        script = "for n in $(seq 200); do head -c 1048576 /dev/zero; sleep 0.02; done"
        talker = await wire.start("sh", "-c", script, limits={"output_bytes": 0})
        record = await ended(wire, talker)
        assert (record["state"], record["output_cut"]) == ("COMPLETED", "disk")
        assert isinstance(record["stdout_bytes"], int)
        assert record["stdout_bytes"] > 96 * MIB
        assert free_bytes(place) > 48 * MIB, "the disks of three jobs, and keep_free"


async def test_host_that_promises_too_much_says_so(open_directory: Directory) -> None:
    directory = open_directory()
    much = {"worker": {"max_concurrent_jobs": 9}, "sandbox": {"disk_limit": 48}}
    async with small_host(directory, much):
        await until(lambda: "the disks of 9 jobs may take 48" in (directory / "log").read_text())


async def test_volume_without_room_is_refused_by_name(open_directory: Directory) -> None:
    async with small_host(open_directory()) as (place, wire):
        with pytest.raises(Refused, match="the server's disk has no room for it"):
            await wire.call("volume.create", name="big", size_bytes=220 * MIB)
        await wire.call("volume.create", name="one", size_bytes=120 * MIB)
        with pytest.raises(Refused, match="the server's disk has no room for it"):
            await wire.call("volume.create", name="two", size_bytes=120 * MIB)
        assert os.listdir(place / "volumes") == ["one.img"]
        await wire.call("volume.remove", name="one")
        await wire.call("volume.create", name="two", size_bytes=120 * MIB)


async def test_without_overcommitment_every_disk_can_be_filled(open_directory: Directory) -> None:
    async with small_host(open_directory(), RESERVED) as (place, wire):
        limits = {"disk_bytes": 64 * MIB}
        script = f"cd /workspace; {WRITE}; yes abcdefg | head -c 33554432 | cmp - x && echo same"
        jobs = [await hold(wire, script, limits=limits) for _ in range(2)]
        with pytest.raises(Refused, match=r"mount-disk.*No space left"):
            await wire.start("true", limits={"disk_bytes": 128 * MIB})
        await trio.to_thread.run_sync(filled, place)
        for job in jobs:
            job.let_go()
            assert (await ended(wire, job.id))["detail"] == ""
        (place / "filler").unlink()
        for job in jobs:
            record = await wire.call("job.status", id=job.id)
            assert (record["state"], record["exit_code"]) == ("COMPLETED", 0)
