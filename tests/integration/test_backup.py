"""The history while another program reads or locks it, as backups do."""

from contextlib import closing
from pathlib import Path

import apsw
import trio

from jobworker.cli.embedded import Embedded

from .wire import Wire


def database(service: Embedded) -> Path:
    return service.directory / "state" / "service" / "history.db"


async def test_job_starts_and_ends_though_a_backup_locks_the_history(
    service: Embedded, admin: Wire
) -> None:
    with closing(apsw.Connection(str(database(service)))) as backup:
        backup.execute("BEGIN IMMEDIATE")
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


async def test_copy_that_is_made_while_jobs_run_is_whole(
    service: Embedded, admin: Wire, tmp_path: Path
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
