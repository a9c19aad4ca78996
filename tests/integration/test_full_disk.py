"""A disk full to its last block: what has ended can be removed, and nobody waits for ever."""

import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import apsw
import pytest
import trio
from attrs import evolve

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.errors import ConfigError, InternalError
from jobworker.jobs.history.history import History
from jobworker.model.job import JobRecord, JobSpec
from jobworker.model.lifecycle import State
from jobworker.model.units import format_size
from jobworker.server.host.copy_on_write import check_overwrites

from ..services import open_embedded
from .conftest import left_behind, until
from .outside import open_launcher, settings_with
from .test_cli import Cli
from .wire import Json, Refused, Wire, open_wire

Directory = Callable[[], Path]
SETTINGS: dict[str, dict[str, object]] = {
    "worker": {"keep_free": 0, "on_disk_full": "discard-output"},
    "sandbox": {"disk_limit": 16},
}
DISK_BYTES = 24 << 20
MAKE_EXT4 = ("mkfs.ext4", "-q", "-m0", "-b4096")
MAKE_BTRFS = ("mkfs.btrfs", "-q")
NOW = datetime(2026, 2, 1, 9, 30, tzinfo=UTC)
NO_LIMIT = {"output_bytes": 0}


@asynccontextmanager
async def small_disk(
    directory: Path, size: int = DISK_BYTES, make: Sequence[str] = MAKE_EXT4
) -> AsyncIterator[Path]:
    """A disk of its own for all that the service keeps, mounted before it starts."""
    image, place = directory / "small.img", directory / "state" / "service"
    place.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(size)
    await trio.run_process([*make, image])
    await trio.run_process(["mount", "-o", "loop", image, place])
    try:
        place.chmod(0o700)
        yield place
    finally:
        with trio.CancelScope(shield=True):
            await trio.run_process(["umount", place])
            image.unlink()


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[tuple[EmbeddedService, Wire]]:
    extra = settings_with(directory, SETTINGS)
    async with open_embedded(directory, extra) as service, open_wire(service) as wire:
        yield service, wire


async def until_status(wire: Wire, job: int, holds: Callable[[Json], bool]) -> Json:
    with trio.fail_after(30):
        while not holds(record := await wire.call("job.status", id=job)):  # noqa: ASYNC110
            await trio.sleep(0.05)
    return record


def fill(place: Path) -> None:
    """Take the last blocks of the disk."""
    fd = os.open(place / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (65_536, 4096, 1):
            try:
                while True:
                    os.write(fd, b"x" * size)
                    os.fsync(fd)
            except OSError:
                continue
    finally:
        os.close(fd)


@contextmanager
def history(place: Path) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(place / "history.db"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        yield connection
    finally:
        connection.close()


def stored(place: Path) -> dict[int, tuple[str, bool]]:
    """What the disk has of each job: its state, and whether its output was removed."""
    query = "SELECT id, state, json_extract(record, '$.output_removed_at') FROM jobs"
    with history(place) as connection:
        return {
            int(str(job)): (str(state), gone is not None)
            for job, state, gone in connection.execute(query)
        }


async def until_stored(place: Path, wanted: dict[int, tuple[str, bool]]) -> None:
    with trio.fail_after(20):
        while stored(place) != wanted:  # noqa: ASYNC110
            await trio.sleep(0.05)


@asynccontextmanager
async def site(directory: Path) -> AsyncIterator[Path]:
    """A launcher, and the small disk on which its services keep what they keep."""
    async with small_disk(directory) as place:
        with open_launcher(directory, SETTINGS):
            yield place
    # A launcher that starts just then, of another test, holds mounts of the host for a moment.
    await until(lambda: left_behind(directory) == [])


def take_what_is_set_aside(place: Path) -> None:
    """Fill the disk, with the room for ends too: as a program does that shortens the log."""
    fill(place)
    connection = apsw.Connection(str(place / "history.db"))
    try:
        connection.set_busy_timeout(5000)
        connection.execute("SELECT count(*) FROM jobs").fetchall()  # or it knows of no log yet
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        fill(place)  # while this connection is open: its end gives nothing back
    finally:
        connection.close()


async def fill_with_ended_jobs(wire: Wire, place: Path) -> tuple[int, int]:
    """Fill the disk, which then refuses to record the ends of a big job and a small one."""
    script = f"head -c {2 * DISK_BYTES} /dev/zero; exec sleep 600"
    small = await wire.start("sh", "-c", "echo small; exec sleep 600")
    await until_status(wire, small, lambda job: bool(job["stdout_bytes"]))
    big = await wire.start("sh", "-c", script, limits=NO_LIMIT)
    await until_status(wire, big, lambda job: job["output_cut"] == "disk")
    await trio.to_thread.run_sync(take_what_is_set_aside, place)
    for job in (small, big):
        assert (await wire.call("job.stop", id=job))["state"] == "STOPPED"
    assert {state for state, _ in stored(place).values()} <= {"INITIALIZING", "RUNNING"}
    return big, small


async def kill(service: EmbeddedService) -> None:
    service.process.kill()
    await service.process.wait()


@pytest.mark.parametrize("force", [False, True])
async def test_ended_job_is_removed_from_a_full_disk(
    open_directory: Directory, force: bool
) -> None:
    directory = open_directory()
    async with site(directory) as place, serving(directory) as (_, wire):
        big, small = await fill_with_ended_jobs(wire, place)
        with trio.fail_after(20):
            freed = (await wire.call("job.remove", id=big, force=force))["bytes"]
        assert isinstance(freed, int)
        assert freed > DISK_BYTES // 4
        await until_stored(place, {small: ("STOPPED", False)})  # there is room for its end now
        text, _, job = await wire.run("echo", "later")
        assert (text, job["state"]) == ("later\n", "COMPLETED")
        result = await wire.call("job.log", id=small)
        assert (await wire.output(result["subscription"]))[0] == b"small\n"


async def test_prune_makes_room_on_a_full_disk(open_directory: Directory) -> None:
    directory = open_directory()
    async with site(directory) as place:
        async with serving(directory) as (service, wire):
            big, small = await fill_with_ended_jobs(wire, place)
            with trio.fail_after(20):
                pruned = await wire.call("job.prune", keep_jobs=0)
            assert pruned["jobs"] == [small, big]
            await until_stored(place, {small: ("STOPPED", True), big: ("STOPPED", True)})
            for job in (small, big):
                assert (await wire.call("job.status", id=job))["output_removed_at"] is not None
            await wire.call("job.remove", id=big)
            await kill(service)
        async with serving(directory) as (_, wire):
            listed = (await wire.call("job.list"))["jobs"]
            assert isinstance(listed, list)
            assert [(job["id"], job["state"]) for job in listed] == [(small, "STOPPED")]


async def test_true_end_is_told_though_the_output_went_before_it_was_recorded(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    async with site(directory) as place:
        async with serving(directory) as (service, wire):
            big, small = await fill_with_ended_jobs(wire, place)
            await kill(service)
        mark = (place / "spool" / str(big)).rename(place / "spool" / f"{big}.removed")
        mark.chmod(0o1700)
        (mark / "index").unlink()  # a removal that the kill cut short
        (place / "filler").unlink()
        async with serving(directory) as (_, wire):
            record = await wire.call("job.wait", id=big)
            assert (record["state"], record["signal"]) == ("STOPPED", signal.SIGKILL)
            assert record["output_removed_at"] is not None
            assert (await wire.call("job.wait", id=small))["state"] == "STOPPED"
            await until_stored(place, {small: ("STOPPED", False), big: ("STOPPED", True)})


async def test_job_that_the_disk_does_not_let_go_stays_whole_without_its_output(
    open_directory: Directory,
) -> None:
    """Where nothing is won by a removal, the history cannot forget the job either."""
    directory = open_directory()
    async with site(directory) as place, serving(directory) as (_, wire):
        big, small = await fill_with_ended_jobs(wire, place)
        await trio.to_thread.run_sync(shutil.rmtree, place / "spool" / str(small))
        await trio.to_thread.run_sync(fill, place)
        with trio.fail_after(20), pytest.raises(Refused, match="disk is full"):
            await wire.call("job.remove", id=small)
        record = await wire.call("job.status", id=small)
        assert record["state"] == "STOPPED"
        assert record["output_removed_at"] is None, "it is missing"
        await wire.call("job.remove", id=big)
        await until_stored(place, {small: ("STOPPED", False)})
        await wire.call("job.remove", id=small)
        assert stored(place) == {}


async def leave_one_block(place: Path) -> None:
    """Fill the disk but for one block: what comes first gets it, and what follows is refused."""
    await trio.to_thread.run_sync(fill, place)
    filler = place / "filler"
    os.truncate(filler, filler.stat().st_size // 4096 * 4096 - 4096)
    await trio.run_process(["sync", "-f", place])  # ext4 gives it back with the transaction


def let_go_on(marker: str) -> bool:
    """Make a file that a job waits for, whose command line names it: whether it is there."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if marker.encode() in (process / "cmdline").read_bytes():
                (process / "root/dev/shm" / marker).touch()
                return True
    return False


async def test_output_that_gets_the_last_block_is_followed_and_told_as_it_is_kept(
    open_directory: Directory,
) -> None:
    """The index, which comes after it, gets none."""
    directory, marker = open_directory(), f"go-{os.urandom(8).hex()}"
    script = f"until test -e /dev/shm/{marker}; do sleep 0.05; done; echo kept"
    async with site(directory) as place:
        async with serving(directory) as (service, wire):
            started = await wire.call("job.run", job={"command": ["sh", "-c", script]}, follow={})
            await leave_one_block(place)
            await until(lambda: let_go_on(marker))
            out, _, end = await wire.output(started["subscription"])
            job = end["id"]
            index = place / "spool" / str(job) / "index"
            assert index.stat().st_size == 0, "else the disk was not as full as it should be"
            assert (out, end["stdout_bytes"], end["discarded_bytes"]) == (b"kept\n", 5, 0)
            assert await kept(wire, job) == (b"kept\n", told(end))
            await kill(service)
        (place / "filler").unlink()
        async with serving(directory) as (_, wire):
            assert await kept(wire, job) == (b"kept\n", told(end))


async def kept(wire: Wire, job: object) -> tuple[bytes, dict[str, object]]:
    """What `log` and `status` have of an ended job."""
    logged = await wire.call("job.log", id=job)
    out, _, _ = await wire.output(logged["subscription"])
    return out, told(await wire.call("job.status", id=job))


async def test_service_that_takes_over_on_a_full_disk_lets_room_be_made(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    async with site(directory) as place:
        async with serving(directory) as (service, wire):
            big, small = await fill_with_ended_jobs(wire, place)
            told = {job: await wire.call("job.wait", id=job) for job in (big, small)}
            assert told[big]["discarded_bytes"]
            await kill(service)
        async with serving(directory) as (service, wire):
            with trio.fail_after(20):
                for job in (big, small):
                    record = await wire.call("job.wait", id=job)
                    assert told[job] == record, "what was told stays as it was told"
                await check_what_a_user_reads(service, big, told[big])
                await wire.call("job.remove", id=big)
            await until_stored(place, {small: ("STOPPED", False)})
            result = await wire.call("job.log", id=small)
            out, _, again = await wire.output(result["subscription"])
            assert (out, again["state"]) == (b"small\n", "STOPPED")


async def check_what_a_user_reads(service: EmbeddedService, job: int, record: Json) -> None:
    """Both `log` and `status` say what was not kept."""
    cli, lost = Cli(service), record["discarded_bytes"]
    assert isinstance(lost, int)
    done = await trio.to_thread.run_sync(cli, "log", str(job))
    assert (done.returncode, len(done.stdout)) == (0, record["stdout_bytes"])
    why = "the server's disk is full, or refused to write"
    assert done.stderr == f"job {job}: {format_size(lost)} of its output were not kept: {why}\n"
    done = await trio.to_thread.run_sync(cli, "status", str(job))
    assert "Status: STOPPED" in done.stdout.splitlines()
    assert f"{format_size(lost)} not kept ({why})" in done.stdout


# --- an end is always recordable ----------------------------------------------------------------

STUBBORN = "trap 'echo stopped; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
TOLD = ("state", "reason", "exit_code", "signal", "detail", "stdout_bytes", "stderr_bytes")
MORE_TOLD = ("discarded_bytes", "output_cut", "started_at", "stop_requested_at", "ended_at")


def told(record: Json) -> dict[str, object]:
    """What must never change of an end."""
    return {name: record[name] for name in (*TOLD, *MORE_TOLD)}


async def end_service(service: EmbeddedService, how: signal.Signals) -> None:
    service.process.send_signal(how)
    with trio.fail_after(30):
        await service.process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
async def test_ends_told_on_a_full_disk_are_recorded_and_stay_as_they_were(
    open_directory: Directory, how: signal.Signals
) -> None:
    directory = open_directory()
    async with site(directory) as place:
        async with serving(directory) as (service, wire):
            quick = [await wire.start("sh", "-c", "sleep 4; exit 3") for _ in range(4)]
            stopped = [await wire.start("sh", "-c", STUBBORN) for _ in range(4)]
            late = await wire.start("sh", "-c", "sleep 300", timeout_seconds=4)
            for job in stopped:
                await until_status(wire, job, lambda record: record["stdout_bytes"] == 6)
            await trio.to_thread.run_sync(fill, place)
            records: dict[int, Json] = {}
            for job in stopped:
                records[job] = await wire.call("job.stop", id=job)
                assert records[job]["state"] == "STOPPED"
                assert records[job]["discarded_bytes"] == 0 or records[job]["output_cut"] == "disk"
            for job in (*quick, late):
                records[job] = await wire.call("job.wait", id=job)
            assert {records[job]["exit_code"] for job in quick} == {3}
            assert records[late]["reason"] == "timeout"
            # Recorded by the time at which they are told, though there is no room at all.
            assert {job: state for job, (state, _) in stored(place).items()} == {
                job: record["state"] for job, record in records.items()
            }
            await end_service(service, how)
        async with serving(directory) as (_, wire):
            for job, record in records.items():
                assert told(await wire.call("job.status", id=job)) == told(record)
                assert told(await wire.call("job.wait", id=job)) == told(record)


async def test_what_is_new_leaves_the_room_for_ends_alone_on_a_full_disk(
    open_directory: Directory,
) -> None:
    async with small_disk(open_directory()) as place:
        kept = History.open(place / "history.db")
        live = [record(kept, number) for number in range(60)]
        for each in live:
            await kept.put(each, is_new=True)
        await trio.to_thread.run_sync(fill, place)
        refused = 0
        for number in range(600):
            try:
                await kept.put(record(kept, number), is_new=True)
            except InternalError:
                refused += 1
        assert refused > 100, "what is new takes half of what is set aside at most"
        for each in live:
            end = evolve(each, state=State.STOPPED, detail="y" * 2000, ended_at=NOW)
            await kept.put(end)
            assert await kept.get(each.id) == end
        (place / "filler").unlink()
        await kept.put(record(kept, 0), is_new=True)
        kept.close()


def record(kept: History, number: int) -> JobRecord:
    spec = JobSpec(command=("true", "x" * 2000), name=f"job-{number}")
    return JobRecord(
        id=kept.take_id(), spec=spec, owner="tester", state=State.INITIALIZING, created_at=NOW
    )


@pytest.mark.skipif(
    shutil.which("mkfs.btrfs") is None or "\tbtrfs\n" not in Path("/proc/filesystems").read_text(),
    reason="needs btrfs and btrfs-progs",
)
async def test_disk_that_holds_no_room_for_ends_is_named(open_directory: Directory) -> None:
    directory = open_directory()
    async with small_disk(directory, 128 << 20, MAKE_BTRFS) as place:
        async with open_embedded(directory) as service:
            await until(lambda: "cannot keep room for jobs' ends" in service.log_text())
            assert "btrfs writes each block to a new place" in service.log_text()
        with pytest.raises(ConfigError, match="btrfs"):
            check_overwrites(place)
    check_overwrites(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount, and be another user")
@pytest.mark.parametrize("option", ["-b4096", "-b1024", "-O^has_journal"])
@pytest.mark.parametrize("clean", [False, True], ids=["killed", "ended"])
async def test_history_opens_where_none_but_root_may_have_a_block(
    open_directory: Directory, option: str, clean: bool
) -> None:
    """Jobs' disks are written by the kernel, which may use what ext4 keeps for root."""
    make = ("mkfs.ext4", "-q", "-m50", option)
    async with small_disk(open_directory(), make=make) as place:
        os.chown(place, 65534, 65534)
        await run_as_user(place, "kill" if not clean else "close", job=1)
        fill(place)
        for job in (2, 3):
            await run_as_user(place, "kill" if not clean else "close", job=job)
        with history(place) as connection:
            assert [row[0] for row in connection.execute("SELECT id FROM jobs")] == [1, 2, 3]


USER = """
import os, signal, sys, trio
from datetime import datetime, UTC
from pathlib import Path
from jobworker.jobs.history.history import History
from jobworker.model.job import JobRecord, JobSpec
from jobworker.model.lifecycle import State

place, end, job = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
history = History.open(place / "history.db")
record = JobRecord(id=job, spec=JobSpec(command=("true",)), owner="a", state=State.COMPLETED,
                   created_at=datetime.now(UTC))
trio.run(history.put, record)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
history.close()
"""


async def run_as_user(place: Path, end: str, job: int) -> None:
    """Put one record as a user who is not root, and end."""
    words = [sys.executable, "-c", USER, str(place), end, str(job)]
    done = await trio.run_process(words, capture_stderr=True, check=False)
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr.decode()
