"""Output whose files are not as the service left them: what is there is shown, the rest told.

A power cut, a repair of the file system, a copy put back or a disk that is not mounted: real
services over real launchers, and in between another hand has been at the files.
"""

import base64
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import apsw
import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.jobs.output.directory import mark_of, was_removed
from jobworker.jobs.retention import KeptOutput
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.jobs.sweep import prune

from ..services import open_embedded
from .conftest import until
from .outside import open_launcher
from .test_ends_over_restarts import end
from .test_full_disk import small_disk, until_status
from .test_lost_state import service_in, spool, told
from .test_takeover import COUNTER, log_of, processes, serving, start, until_bigger
from .wire import Json, Refused, Wire, open_wire

Directory = Callable[[], Path]


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


async def log_and_end(wire: Wire, job: int) -> tuple[bytes, Json]:
    """Standard output, and what `job.output_end` says."""
    result = await wire.call("job.log", id=job)
    out = b""
    async for message in wire.notes(result["subscription"]):
        params = message["params"]
        assert isinstance(params, dict)
        if message["method"] == "job.output_end":
            return out, params
        if params["stream"] == "stdout":
            out += base64.b64decode(params["data"])
    raise AssertionError("the subscription ended without a word")


async def test_ended_output_that_became_shorter_is_told_and_can_be_put_back(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    async with service_in(directory) as (_, wire):
        job = await start(wire, "seq 1 9; echo err >&2")
        await wire.call("job.wait", id=job)
        whole = tree(spool(directory, job))
        os.truncate(spool(directory, job) / "stdout", 4)
        cut = tree(spool(directory, job))
        out, end = await log_and_end(wire, job)
        assert out == b"1\n2\n"
        assert "14 of 18 bytes of stdout are missing" in str(end["error"])
        assert "output_failed" in str(end["error"])
    async with service_in(directory) as (service, wire):
        assert (await log_and_end(wire, job))[0] == b"1\n2\n"
        assert tree(spool(directory, job)) == cut, "nothing of it was changed"
        await until(lambda: "14 of 18 bytes of stdout are missing" in service.log_text())
        (spool(directory, job) / "stdout").write_bytes(whole["stdout"])
        out, end = await log_and_end(wire, job)
        assert (out, end["error"]) == (whole["stdout"], None)
        assert (await told(wire, job))["stdout_bytes"] == 18


async def test_live_output_that_became_shorter_is_told_with_the_job(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, COUNTER)
            await until_bigger(wire, job, 20)
            service.process.kill()
            await service.process.wait()
        stdout = spool(directory, job) / "stdout"
        lost = stdout.stat().st_size - 7
        os.truncate(stdout, 7)
        async with serving(directory) as service, open_wire(service) as wire:
            after = await told(wire, job)
            assert f"{lost} bytes of output from before " in str(after["detail"])
            assert after["discarded_bytes"] == lost
            await wire.call("job.stop", id=job)
            assert (await log_of(wire, job))[0].startswith(b"0\n1\n2\n3")
            assert (await told(wire, job))["discarded_bytes"] == lost


async def until_missing(service: EmbeddedService, count: int) -> None:
    with trio.fail_after(20):
        while f"the output of {count} ended jobs is missing" not in service.log_text():  # noqa: ASYNC110
            await trio.sleep(0.05)


async def assert_missing(wire: Wire, jobs: list[int]) -> None:
    for job in jobs:
        record = await until_status(  # its end may only just be recorded
            wire, job, lambda record: "missing on the server" in str(record["detail"])
        )
        assert record["output_removed_at"] is None
        with pytest.raises(Refused, match=r"missing on the server; no request and no rule"):
            await wire.call("job.log", id=job)


async def assert_back(wire: Wire, jobs: list[int]) -> None:
    for job in jobs:
        assert (await log_of(wire, job))[0] == b"kept\n"
        record = await told(wire, job)
        assert (record["output_removed_at"], record["detail"]) == (None, "")


async def pruned(wire: Wire) -> list[object]:
    jobs = (await wire.call("job.prune", keep_jobs=0))["jobs"]
    assert isinstance(jobs, list)
    return sorted(jobs)


async def kept_jobs(wire: Wire, count: int = 3) -> list[int]:
    jobs = [await start(wire, "echo kept") for _ in range(count)]
    for job in jobs:
        await wire.call("job.wait", id=job)
    return jobs


async def test_spool_that_was_away_at_a_start_is_whole_when_it_is_back(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    spools, away = spool(directory, 1).parent, directory / "away"
    async with service_in(directory) as (_, wire):
        jobs = await kept_jobs(wire)
    spools.rename(away)  # as if its disk were not mounted
    async with service_in(directory) as (service, wire):
        await until_missing(service, 3)
        await assert_missing(wire, jobs)
    spools.rmdir()
    away.rename(spools)
    async with service_in(directory) as (_, wire):
        await assert_back(wire, jobs)
        assert await pruned(wire) == jobs
        for job in jobs:
            assert (await told(wire, job))["output_removed_at"] is not None
        assert list(spools.iterdir()) == []


async def test_spool_that_is_moved_beside_the_service_is_whole_when_it_is_back(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    spools, away = spool(directory, 1).parent, directory / "away"
    async with service_in(directory) as (service, wire):
        jobs = await kept_jobs(wire)
        spools.rename(away)
        await assert_missing(wire, jobs)
        assert await pruned(wire) == []
        await until_missing(service, 3)
        away.rename(spools)
        await assert_back(wire, jobs)
        shutil.rmtree(spool(directory, jobs[0]))
        await assert_missing(wire, jobs[:1])
        assert await pruned(wire) == jobs[1:]
        await wire.call("job.remove", id=jobs[0])
        with pytest.raises(Refused, match="no such job"):
            await told(wire, jobs[0])
        assert "incident" not in service.log_text()


async def test_output_that_cannot_be_read_is_in_the_way_of_no_other_jobs(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    worker = {"worker": {"max_total_output": 2, "keep_free": 0}}
    async with open_embedded(directory, worker) as service, open_wire(service) as wire:
        jobs = [await start(wire, "head -c 600000 /dev/zero") for _ in range(3)]
        for job in jobs:
            await wire.call("job.wait", id=job)
        output = spool(directory, jobs[0])
        if os.geteuid() == 0:  # as who copies it back has it
            os.chown(output, 0, 0)
        output.chmod(0)
        with pytest.raises(Refused, match=f"in {output}: Permission denied"):
            await wire.call("job.remove", id=jobs[0])
        large = await wire.call("job.wait", id=await start(wire, "head -c 1200000 /dev/zero"))
        assert (large["state"], large["stdout_bytes"]) == ("COMPLETED", 1_200_000)
        assert (await told(wire, jobs[1]))["output_removed_at"] is not None
        assert jobs[0] not in await pruned(wire)
        log_text = service.log_text()
        assert log_text.count(f"job {jobs[0]}: its output counts for nothing, and stays") == 1
        assert "incident" not in log_text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_output_of_an_end_that_was_told_outlives_a_power_cut(
    open_directory: Directory, tmp_path: Path
) -> None:
    """What the disk has at that moment is a copy of the image below the file system."""
    directory = open_directory()
    copy, place = tmp_path / "copy.img", tmp_path / "place"
    place.mkdir()
    async with small_disk(directory, size=256 << 20), service_in(directory) as (_, wire):
        jobs = [await start(wire, "seq 1 20000; echo err >&2") for _ in range(3)]
        for job in jobs:
            await wire.call("job.wait", id=job)
        await trio.to_thread.run_sync(shutil.copy, directory / "small.img", copy)
        whole = {job: tree(spool(directory, job)) for job in jobs}
    await trio.run_process(["mount", "-o", "loop", copy, place])
    try:
        for job in jobs:
            there = tree(place / "spool" / str(job))
            for name in ("stdout", "stderr", "index"):
                assert there[name] == whole[job][name], name
    finally:
        with trio.CancelScope(shield=True):
            await trio.run_process(["umount", place])


@pytest.mark.parametrize("what", ["a job's directory", "all of them"])
async def test_job_that_was_removed_while_its_output_was_missing_stays_removed(
    open_directory: Directory, what: str
) -> None:
    directory = open_directory()
    async with service_in(directory) as (_, wire):
        job, other = await kept_jobs(wire, 2)
    output, away = spool(directory, job), directory / "away"
    moved = output.parent if what == "all of them" else output
    moved.rename(away)
    async with service_in(directory) as (_, wire):
        await wire.call("job.remove", id=job)
    if moved.exists():
        moved.rmdir()
    away.rename(moved)
    async with service_in(directory) as (service, wire):
        with pytest.raises(Refused, match="no such job"):
            await told(wire, job)
        assert not output.exists()
        await until(
            lambda: f"job {job} was removed while its output was missing" in service.log_text()
        )
        await assert_back(wire, [other])


async def test_directory_that_only_has_the_name_of_a_removed_one_is_left_alone(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    async with service_in(directory) as (_, wire):
        jobs = await kept_jobs(wire, 1)
        output = spool(directory, jobs[0])
        whole, away = tree(output), output.with_name(f"{output.name}.removed")
        output.rename(away)
        await assert_missing(wire, jobs)
        assert await pruned(wire) == []
        assert tree(away) == whole
        away.rename(output)
        await assert_back(wire, jobs)


async def test_output_that_is_put_back_beside_the_word_of_its_removal_counts(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    async with service_in(directory) as (_, wire):
        jobs = await kept_jobs(wire, 1)
    output, copy = spool(directory, jobs[0]), directory / "copy"
    shutil.copytree(output, copy)
    kept = KeptOutput(output.parent)  # as `worker prune` has it
    kept.load()
    assert prune(kept, RetentionPolicy(max_jobs=0))
    copy.rename(output)
    async with service_in(directory) as (_, wire):
        await assert_back(wire, jobs)
        assert [path.name for path in output.parent.iterdir()] == [output.name]


async def test_end_that_was_told_is_known_though_output_went_before_its_record(
    open_directory: Directory,
) -> None:
    """The history refuses ends, as on a full disk."""
    directory = open_directory()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            history = apsw.Connection(str(directory / "state" / "service" / "history.db"))
            history.set_busy_timeout(60_000)
            history.execute(
                "CREATE TRIGGER full BEFORE UPDATE ON jobs WHEN NEW.state = 'FAILED' "
                "BEGIN SELECT RAISE(ABORT, 'no room'); END"
            )
            job = await start(wire, "echo whole; exit 5")
            before = await wire.call("job.wait", id=job)

            async def prune() -> None:
                with suppress(trio.EndOfChannel):
                    await wire.call("job.prune", keep_jobs=0)

            output = spool(directory, job)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(prune)
                await until(lambda: was_removed(output))
                await until(lambda: not (mark_of(output) / "stdout").exists())
                await end(service, signal.SIGKILL)
            history.execute("DROP TRIGGER full")
            history.close()
        for _ in range(2):
            async with serving(directory) as service, open_wire(service) as wire:
                after = await until_status(
                    wire, job, lambda record: record["output_removed_at"] is not None
                )
                same = ("state", "exit_code", "ended_at", "stdout_bytes")
                assert [after[key] for key in same] == [before[key] for key in same]
                with pytest.raises(Refused, match="not kept any more since"):
                    await wire.call("job.log", id=job)
                await until(lambda: not list(output.parent.iterdir()))


async def test_output_of_an_end_that_nobody_saw_is_set_aside_and_not_deleted(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    mark = f"unseen-{os.getpid()}-"
    script = f"trap go=1 USR1; echo up; while [ -z $go ]; do sleep 0.05; done; exit 3; : {mark}"
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, script)
            await until_bigger(wire, job, 0)
            await end(service, signal.SIGKILL)
        for pid in processes(mark):
            os.kill(pid, signal.SIGUSR1)
        await until(lambda: not processes(mark))
        for name in ("record", "index"):
            (spool(directory, job) / name).unlink()
        async with serving(directory) as service, open_wire(service) as wire:
            ended = await wire.call("job.wait", id=job)
            assert (ended["exit_code"], ended["output_removed_at"]) == (3, None)
            assert "output from before" in str(ended["detail"])
        (aside,) = (directory / "state" / "service" / "set-aside").iterdir()
        assert (aside / "stdout").read_bytes() == b"up\n"
