"""The history while another program reads or locks it, as backups do."""

import os
import signal
from contextlib import closing
from pathlib import Path

import apsw
import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService

from .conftest import locked_history, until
from .test_takeover import processes, until_bigger
from .wire import Json, Refused, Wire


def database(service: EmbeddedService) -> Path:
    return service.directory / "state" / "service" / "history.db"


async def test_job_starts_and_ends_though_a_backup_locks_the_history(
    service: EmbeddedService, admin: Wire
) -> None:
    with locked_history(service.directory) as backup:
        async with trio.open_nursery() as nursery:
            out: list[str] = []

            async def run() -> None:
                out.append((await admin.run("echo", "done"))[0])

            nursery.start_soon(run)
            await trio.sleep(0.5)
            assert (await admin.call("job.list", limit=1))["jobs"] is not None
            assert out == []
            backup.execute("COMMIT")
    assert out == ["done\n"]


async def ids_of(admin: Wire, state: str) -> list[object]:
    jobs = (await admin.call("job.list", states=[state], limit=1))["jobs"]
    assert isinstance(jobs, list)
    return [job["id"] for job in jobs]


async def log_of_now(admin: Wire, job: int) -> tuple[bytes, Json]:
    result = await admin.call("job.log", id=job, follow=False)
    out, _, record = await admin.output(result["subscription"])
    return out, record


async def test_job_is_shown_alive_until_its_end_is_in_the_history(
    service: EmbeddedService, admin: Wire
) -> None:
    seconds = f"41739.{os.getpid()}"
    job = await admin.start("sh", "-c", f"echo hello; exec sleep {seconds}")
    await until_bigger(admin, job, 0)
    index = service.directory / "state" / "service" / "spool" / str(job) / "index"
    before = index.stat().st_size
    await until(lambda: processes(f"sleep\0{seconds}\0"))
    (process,) = processes(f"sleep\0{seconds}\0")
    with locked_history(service.directory) as backup, trio.fail_after(9):
        os.kill(process, signal.SIGKILL)
        while index.stat().st_size == before:  # noqa: ASYNC110 - until it is sealed
            await trio.sleep(0.01)
        told = await admin.call("job.status", id=job)
        assert (told["state"], told["stdout_bytes"], told["signal"]) == ("RUNNING", 6, None)
        out, told = await log_of_now(admin, job)
        assert (out, told["state"]) == (b"hello\n", "RUNNING")
        assert await ids_of(admin, "RUNNING") == [job]
        assert job not in await ids_of(admin, "FAILED")
        with pytest.raises(Refused, match="it has not ended"):
            await admin.call("job.remove", id=job)
        backup.execute("COMMIT")
    ended = await admin.call("job.wait", id=job)
    assert (ended["state"], ended["stdout_bytes"], ended["signal"]) == ("FAILED", 6, 9)
    assert await log_of_now(admin, job) == (b"hello\n", ended)
    assert await ids_of(admin, "FAILED") == [job]


async def test_copy_that_is_made_while_jobs_run_is_whole(
    service: EmbeddedService, admin: Wire, tmp_path: Path
) -> None:
    for _ in range(3):
        await admin.run("true")
    copy = tmp_path / "copy.db"
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(admin.run, "true")
        with (
            closing(apsw.Connection(str(database(service)))) as source,
            closing(apsw.Connection(str(copy))) as target,
            target.backup("main", source, "main") as backup,
        ):
            while not backup.done:
                backup.step(5)
                await trio.sleep(0.002)
    with closing(apsw.Connection(str(copy))) as connection:
        assert connection.execute("PRAGMA integrity_check").get == "ok"
        count = connection.execute("SELECT count(*) FROM jobs").get
        assert isinstance(count, int)
        assert count >= 3
