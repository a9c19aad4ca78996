"""State files that are missing, older, newer, foreign, damaged: adopted, set aside or refused.

Real services over real launchers; in between somebody has been at the files. Nothing that was
there may be destroyed, and no id may be given twice.
"""

import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import apsw
import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.errors import HostUnsupported
from jobworker.jobs.output.directory import NOTE
from jobworker.sandbox.protocol.requests import MAX_JOB

from ..services import open_embedded
from .conftest import left_behind, until
from .outside import open_launcher
from .test_full_disk import small_disk
from .test_takeover import COUNTER, log_of, serving, start, until_bigger
from .wire import Json, Refused, Wire, open_wire


@asynccontextmanager
async def service_in(directory: Path) -> AsyncIterator[tuple[EmbeddedService, Wire]]:
    async with open_embedded(directory) as service, open_wire(service) as wire:
        yield service, wire


def history(directory: Path) -> Path:
    return directory / "state" / "service" / "history.db"


def spool(directory: Path, job: int) -> Path:
    return directory / "state" / "service" / "spool" / str(job)


def remove_history(directory: Path) -> None:
    for path in history(directory).parent.glob("history.db*"):
        path.unlink()


def empty_history(directory: Path) -> None:
    os.truncate(history(directory), 0)


async def told(wire: Wire, job: int) -> Json:
    return await wire.call("job.status", id=job)


JOBS = 20
"""The last one's id, too, in `after_an_end` and `after_a_kill`."""


async def run_some(directory: Path, *, kill: bool) -> Path:
    async with service_in(directory) as (service, wire):
        for n in range(1, JOBS + 1):
            job = await start(wire, f"echo {n}", labels={"filler": "x" * 60})
            assert job == n
            await wire.call("job.wait", id=job)
        if kill:
            service.process.kill()
            await service.process.wait()
    return directory


@pytest.fixture(scope="module")
def after_an_end(open_directory: Callable[[], Path]) -> Path:
    """What a service has left that ran JOBS jobs: for copies, to be as it is for each test."""
    return trio.run(partial(run_some, open_directory(), kill=False))


@pytest.fixture(scope="module")
def after_a_kill(open_directory: Callable[[], Path]) -> Path:
    """The same of one that was killed."""
    return trio.run(partial(run_some, open_directory(), kill=True))


def copy(made: Path, directory: Path) -> Path:
    """What a service has left, in the directory of another."""
    for name in ("certs", "state"):
        (directory / name).mkdir(exist_ok=True)
        subprocess.run(["cp", "-a", f"{made / name}/.", directory / name], check=True)
    return directory


SAME = ("owner", "state", "reason", "exit_code", "spec", "created_at", "ended_at", "stdout_bytes")


@pytest.mark.parametrize("lose", [remove_history, empty_history])
async def test_output_is_adopted_where_the_history_is_gone(
    open_directory: Callable[[], Path], lose: Callable[[Path], None]
) -> None:
    directory = open_directory()
    async with service_in(directory) as (service, wire):
        jobs = [await start(wire, f"echo {n}; exit {n}", name=f"n{n}") for n in range(5)]
        before = {job: await wire.call("job.wait", id=job) for job in jobs}
        gone = await start(wire, "echo gone")
        await wire.call("job.wait", id=gone)
        await wire.call("job.remove", id=gone)
    lose(directory)
    async with service_in(directory) as (service, wire):
        for n, job in enumerate(jobs):
            after = await told(wire, job)
            assert {k: after[k] for k in SAME} == {k: before[job][k] for k in SAME}
            assert (await log_of(wire, job))[0] == f"{n}\n".encode()
        assert "adopted" in service.log_text()
        assert await start(wire, "true") == gone + 1, "no id is given twice"
    assert left_behind(directory) == []


async def test_live_job_is_adopted_where_the_history_is_gone(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, COUNTER, name="counts")
            ended = await start(wire, "exit 3")
            await wire.call("job.wait", id=ended)
            await until_bigger(wire, job, 20)
        remove_history(directory)
        async with serving(directory) as service, open_wire(service) as wire:
            after = await told(wire, job)
            assert (after["state"], after["owner"]) == ("RUNNING", "admin-client")
            assert (await told(wire, ended))["exit_code"] == 3
            assert "adopted" in service.log_text()
            await until_bigger(wire, job, int(str(after["stdout_bytes"])))
            await wire.call("job.stop", id=job)
            data, _ = await log_of(wire, job)
            assert data.decode().split() == [str(n) for n in range(len(data.split()))]
            assert await start(wire, "true") == ended + 1
    assert left_behind(directory) == []


async def test_live_job_goes_on_where_all_that_the_service_had_is_gone(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, COUNTER)
            await until_bigger(wire, job, 20)
        shutil.rmtree(directory / "state" / "service")
        async with serving(directory) as service, open_wire(service) as wire:
            after = await told(wire, job)
            assert after["state"] == "RUNNING"
            assert "'command': ['unknown']" in str(after["spec"])
            assert "made anew" in str(after["detail"])
            await until_bigger(wire, job, int(str(after["stdout_bytes"])))
            await wire.call("job.stop", id=job)
            assert await start(wire, "true") == job + 1
    assert left_behind(directory) == []


async def test_older_copy_of_the_history_takes_nothing_along(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    older = directory / "copy.db"
    one = {"worker": {"max_concurrent_jobs": 1}}
    with open_launcher(directory):
        async with serving(directory, one) as service, open_wire(service) as wire:
            early = await start(wire, "sleep 1; exit 5")
            waited = await start(wire, f"echo ran >> {directory}/ran; echo ran; exit 6")
            source = apsw.Connection(str(history(directory)))
            source.set_busy_timeout(60_000)
            with apsw.Connection(str(older)).backup("main", source, "main") as backup:
                backup.step()
            source.close()
            before = {job: await wire.call("job.wait", id=job) for job in (early, waited)}
            lives = await start(wire, "echo lives; sleep 1000")
            await until_bigger(wire, lives, 0)
            later = await start(wire, "echo later")
        remove_history(directory)
        shutil.copy(older, history(directory))  # as root does it: the file is root's now
        async with serving(directory, one) as service, open_wire(service) as wire:
            for job in (early, waited):
                after = await told(wire, job)
                assert {k: after[k] for k in SAME} == {k: before[job][k] for k in SAME}
            assert (await log_of(wire, waited))[0] == b"ran\n"
            assert (await told(wire, lives))["state"] == "RUNNING"
            assert (await told(wire, later))["state"] == "FAILED", "nobody knows whether it ran"
            assert await start(wire, "true") == later + 1
            await wire.call("job.stop", id=lives)
    assert left_behind(directory) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a service that root starts is given its files")
async def test_files_that_were_put_back_read_only_can_be_written_again(
    open_directory: Callable[[], Path], after_an_end: Path
) -> None:
    directory = copy(after_an_end, open_directory())
    for path in (*history(directory).parent.rglob("*"), history(directory).parent):
        path.chmod(path.stat().st_mode & ~0o222)
    other = directory / "other"
    other.write_text("not the service's")
    other.chmod(0o400)
    os.link(other, history(directory).with_name("a second name"))
    async with service_in(directory) as (service, wire):
        assert await start(wire, "true") == JOBS + 1
        assert (await log_of(wire, JOBS))[0] == f"{JOBS}\n".encode()
        await wire.call("job.remove", id=JOBS)
        assert "ERROR" not in service.log_text()
    assert (other.stat().st_mode & 0o777, other.stat().st_uid) == (0o400, 0)


def newer(path: Path) -> None:
    connection = apsw.Connection(str(path))
    connection.pragma("user_version", 99)
    connection.close()


def foreign_text(path: Path) -> None:
    path.write_text("Dear diary,\n" * 1000)


def foreign_database(path: Path) -> None:
    remove_history(path.parents[2])
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE diary (day, text); INSERT INTO diary VALUES (1, 'sun')")
    connection.close()


def foreign_database_with_a_version(path: Path) -> None:
    foreign_database(path)
    connection = apsw.Connection(str(path))
    connection.pragma("user_version", 1)
    connection.close()


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def torn(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(path.stat().st_size - 4096))


def directory_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("precious")


def bad_record(path: Path) -> None:
    connection = apsw.Connection(str(path))
    connection.execute("UPDATE jobs SET state = 'RUNNING', record = '{}'")
    connection.close()


SPOILT: dict[Callable[[Path], None], str] = {
    newer: "version 99",
    foreign_text: "not a database",
    foreign_database: "another program",
    foreign_database_with_a_version: "another program",
    truncated: "malformed",
    torn: "damaged|malformed",
    directory_in_its_place: "directory",
    bad_record: "cannot be read",
}


@pytest.mark.parametrize("spoil", SPOILT)
async def test_history_that_cannot_be_used_is_refused_by_name_and_stays_as_it_is(
    open_directory: Callable[[], Path], after_an_end: Path, spoil: Callable[[Path], None]
) -> None:
    directory = copy(after_an_end, open_directory())
    path = history(directory)
    spoil(path)
    before = tree(path.parent)
    with pytest.raises(HostUnsupported, match=SPOILT[spoil]) as refused:
        async with service_in(directory):
            pass
    assert str(path) in refused.value.message
    assert "Traceback" not in refused.value.message
    assert tree(path.parent) == before, "nothing was touched"
    path.rename(path.with_name("spoilt"))
    for other in path.parent.glob("history.db-*"):
        other.unlink()
    async with service_in(directory) as (_, wire):  # as the error says
        assert (await log_of(wire, JOBS))[0] == f"{JOBS}\n".encode()
        assert await start(wire, "true") == JOBS + 1
    assert left_behind(directory) == []


def tree(directory: Path) -> dict[str, bytes]:
    """All files below a directory, without what SQLite makes to read a database."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.endswith(("-wal", "-shm", ".jsonl"))
    }


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize(
    ("end", "remedy"),
    [("", "put a copy back"), ("-wal", "put the file itself back"), ("-shm", "made anew")],
)
async def test_what_is_no_file_of_the_history_is_named_with_what_to_do(
    open_directory: Callable[[], Path],
    after_a_kill: Path,
    make: Callable[[Path], None],
    end: str,
    remedy: str,
) -> None:
    directory = copy(after_a_kill, open_directory())
    file = history(directory).with_name(f"history.db{end}")
    file.unlink()
    make(file)
    before = sorted(path.name for path in file.parent.iterdir())
    with pytest.raises(HostUnsupported, match=f"{file} is a .*; move it away.*{remedy}"):
        async with service_in(directory):
            pass
    assert sorted(path.name for path in file.parent.iterdir()) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount, and make files immutable")
@pytest.mark.parametrize(
    ("name", "flag", "owner"),
    [("history.db", "a", None), ("history.db-wal", "i", None), ("history.db-wal", "i", 0)],
)
async def test_file_that_nobody_may_change_is_named_with_what_lets_it_be_changed(
    open_directory: Callable[[], Path], after_a_kill: Path, name: str, flag: str, owner: int | None
) -> None:
    directory = open_directory()
    async with small_disk(directory, size=256 << 20):
        copy(after_a_kill, directory)
        file = history(directory).with_name(name)
        if owner is not None:  # as where it was copied back
            os.chown(file, owner, owner)
        await trio.run_process(["chattr", f"+{flag}", file])
        try:
            with pytest.raises(HostUnsupported, match=f"not permitted; .*chattr -i -a {file}"):
                async with service_in(directory):
                    pass
        finally:
            with trio.CancelScope(shield=True):
                await trio.run_process(["chattr", f"-{flag}", file])


async def test_start_without_the_spool_directory_is_refused_with_what_to_do(
    open_directory: Callable[[], Path],
) -> None:
    """And the next service has nothing to warn of: the id was given to a job that was refused."""
    directory = open_directory()
    async with service_in(directory) as (_, wire):
        job = await start(wire, "true")
        spools, away = spool(directory, job).parent, directory / "away"
        spools.rename(away)
        with pytest.raises(Refused) as refused:
            await start(wire, "true")
        assert "put the directory service/spool back" in str(refused.value.data)
        away.rename(spools)
    async with service_in(directory) as (service, wire):
        assert "WARNING the history ends" not in service.log_text()
        assert await start(wire, "true") > job


async def test_something_else_at_the_place_of_the_clock_is_told(
    open_directory: Callable[[], Path], after_an_end: Path
) -> None:
    directory = copy(after_an_end, open_directory())
    clock = history(directory).with_name("clock")
    clock.unlink()
    clock.mkdir()
    async with service_in(directory) as (service, _):
        await until(
            lambda: f"for the age of output to {clock}: Is a directory" in service.log_text()
        )


async def test_fifo_at_the_place_of_a_file_holds_no_start_up(
    open_directory: Callable[[], Path], after_an_end: Path
) -> None:
    directory = copy(after_an_end, open_directory())
    kept = history(directory).parent
    for name in ("clock", "last-id", f"spool/{JOBS}/{NOTE}"):
        (kept / name).unlink()
        os.mkfifo(kept / name)
    async with service_in(directory) as (_, wire):
        assert await start(wire, "true") == JOBS + 1


async def test_history_that_a_kill_left_and_that_is_damaged_since_stays_as_it_is(
    open_directory: Callable[[], Path], after_an_end: Path
) -> None:
    """What its write-ahead log has may be all that can be saved."""
    directory = copy(after_an_end, open_directory())  # what is damaged is no more in the log
    async with service_in(directory) as (service, wire):
        await wire.call("job.wait", id=await start(wire, "echo here"))
        service.process.kill()
        await service.process.wait()
    path = history(directory)
    with path.open("r+b") as file:
        file.seek(16)
        file.write(b"\xff" * 20)
    kept = [path, path.with_name("history.db-wal")]
    before = [each.read_bytes() for each in kept]
    assert before[1]
    with pytest.raises(HostUnsupported, match=re.escape(str(path))):
        async with service_in(directory):
            pass
    assert [each.read_bytes() for each in kept] == before


async def test_write_ahead_log_without_its_database_is_set_aside(
    open_directory: Callable[[], Path], after_a_kill: Path
) -> None:
    directory = copy(after_a_kill, open_directory())
    wal = history(directory).with_name("history.db-wal")
    said = wal.read_bytes()
    assert said
    history(directory).unlink()
    async with service_in(directory) as (_, wire):
        assert (await log_of(wire, JOBS))[0] == f"{JOBS}\n".encode()
    (kept,) = wal.parent.glob("history.db-wal.orphan-*")
    assert kept.read_bytes() == said


async def test_spool_directory_that_is_missing_ends_no_live_job(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    one = {"worker": {"max_concurrent_jobs": 1}}
    with open_launcher(directory):
        async with serving(directory, one) as service, open_wire(service) as wire:
            job = await start(wire, COUNTER)
            waiting = await start(wire, "echo waited")
            await until_bigger(wire, job, 20)
        spool(directory, job).parent.rename(directory / "elsewhere")
        async with serving(directory, one) as service, open_wire(service) as wire:
            after = await told(wire, job)
            assert after["state"] == "RUNNING"
            assert "missing" in str(after["detail"])
            await until_bigger(wire, job, int(str(after["stdout_bytes"])))
            await wire.call("job.stop", id=job)
            assert (await wire.call("job.wait", id=waiting))["exit_code"] == 0
            assert (await log_of(wire, waiting))[0] == b"waited\n"
    assert left_behind(directory) == []


def file_in_its_place(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("precious")


def link_in_its_place(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def no_index(path: Path) -> None:
    (path / "index").unlink()


def bad_index(path: Path) -> None:
    (path / "index").write_bytes(b"\xff" * 77)


def directory_for_index(path: Path) -> None:
    (path / "index").unlink()
    (path / "index").mkdir()


def fifo_for_index(path: Path) -> None:
    no_index(path)
    os.mkfifo(path / "index")


SPOILT_SPOOLS = [
    file_in_its_place,
    link_in_its_place,
    no_index,
    bad_index,
    directory_for_index,
    fifo_for_index,
]


@pytest.mark.parametrize("spoil", SPOILT_SPOOLS)
async def test_output_of_a_live_job_that_cannot_be_used_is_set_aside(
    open_directory: Callable[[], Path], spoil: Callable[[Path], None]
) -> None:
    directory = open_directory()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, COUNTER)
            await until_bigger(wire, job, 20)
        spoil(spool(directory, job))
        async with serving(directory) as service, open_wire(service) as wire:
            after = await told(wire, job)
            assert after["state"] == "RUNNING"
            await until_bigger(wire, job, int(str(after["stdout_bytes"])))
            await wire.call("job.stop", id=job)
            if spoil is not bad_index:  # which is made anew, from the bytes that are there
                assert "missing" in str(after["detail"])
                (aside,) = (directory / "state" / "service" / "set-aside").iterdir()
                assert aside.name.startswith(f"{job}-")
    assert left_behind(directory) == []


@pytest.mark.parametrize("spoil", SPOILT_SPOOLS)
@pytest.mark.parametrize("known", [True, pytest.param(False, marks=pytest.mark.soak)])
async def test_output_of_an_ended_job_that_cannot_be_used_stays(
    open_directory: Callable[[], Path],
    after_an_end: Path,
    spoil: Callable[[Path], None],
    known: bool,
) -> None:
    directory = copy(after_an_end, open_directory())
    spoil(spool(directory, JOBS))
    before = tree(spool(directory, JOBS).parent)
    if not known:
        remove_history(directory)
    async with service_in(directory) as (_, wire):
        assert await start(wire, "true") == JOBS + 1
        if known:
            assert (await told(wire, JOBS))["state"] == "COMPLETED"
    after = tree(spool(directory, JOBS).parent)
    assert {name for name in before if "index" not in name} <= after.keys()


async def test_what_is_no_job_in_the_spool_directory_is_left_alone(
    open_directory: Callable[[], Path], after_an_end: Path
) -> None:
    directory, job = copy(after_an_end, open_directory()), JOBS
    spools = spool(directory, job).parent
    high = (str(MAX_JOB), str(MAX_JOB + 1), "9007199254740991")
    names = ("²", "007", "-1", "9" * 40, "lost+found", "0", *high)
    for name in names:
        (spools / name).mkdir()
        (spools / name / "file").write_text(name)
    (spools / str(job + 1)).write_text("a file")
    os.mkfifo(spools / str(job + 2))
    (spools / str(job + 4)).mkdir()
    async with service_in(directory) as (service, wire):
        assert await start(wire, "true") == job + 3
        assert await start(wire, "true") == job + 5
        assert f"{MAX_JOB} is no job's output" in service.log_text()
    for name in names:
        assert (spools / name / "file").read_text() == name
    assert (spools / str(job + 1)).read_text() == "a file"


async def test_job_is_refused_where_ids_are_used_up_and_the_others_go_on(
    open_directory: Callable[[], Path], after_an_end: Path
) -> None:
    directory = copy(after_an_end, open_directory())
    history(directory).with_name("last-id").write_text(f"{MAX_JOB - 1}\n")
    async with service_in(directory) as (_, wire):
        last = await start(wire, COUNTER)
        assert last == MAX_JOB
        for _ in range(2):
            with pytest.raises(Refused, match="none may be higher"):
                await start(wire, "true")
        assert (await told(wire, last))["state"] == "RUNNING"
    assert left_behind(directory) == []
