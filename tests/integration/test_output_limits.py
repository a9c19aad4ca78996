"""Limits on output: the job's own, that of all jobs, the disk; and what is kept afterwards."""

import base64
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService, program

from ..services import open_embedded
from .conftest import until
from .wire import Json, Refused, Wire, open_wire

Directory = Callable[[], Path]


@asynccontextmanager
async def serving(directory: Path, **worker: object) -> AsyncIterator[tuple[EmbeddedService, Wire]]:
    async with open_embedded(directory, {"worker": worker}) as service, open_wire(service) as admin:
        yield service, admin


@asynccontextmanager
async def small_disk(directory: Path, size: str) -> AsyncIterator[None]:
    """A file system of its own for the spool, mounted before the service starts."""
    spool = directory / "state" / "service" / "spool"
    spool.mkdir(parents=True)
    options = f"size={size},mode=700"
    await trio.run_process(["mount", "-t", "tmpfs", "-o", options, "tmpfs", spool])
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await trio.run_process(["umount", spool])


async def finished(admin: Wire, *command: str, **spec: object) -> Json:
    return (await admin.run(*command, **spec))[2]


# --- a job's own limit ----------------------------------------------------------------------


async def test_job_goes_on_beyond_its_limit_and_the_record_says_so(admin: Wire) -> None:
    limits = {"output_bytes": 1000}
    out, _, job = await admin.run(
        "sh", "-c", "head -c 5000 /dev/zero | tr '\\0' x; exit 3", limits=limits
    )
    assert out == "x" * 1000
    assert (job["state"], job["exit_code"]) == ("FAILED", 3)
    assert (job["stdout_bytes"], job["discarded_bytes"]) == (1000, 4000)
    assert job["output_cut"] == "limit"
    assert "reached the limit of 1000 B" in str(job["detail"])


async def test_job_is_stopped_at_its_limit_where_that_is_asked_for(admin: Wire) -> None:
    with trio.fail_after(20):
        job = await finished(admin, "yes", limits={"output_bytes": 100_000}, at_max_output="stop")
    assert (job["state"], job["reason"], job["output_cut"]) == ("FAILED", "output", "limit")
    assert job["stdout_bytes"] == 100_000


async def test_job_that_ends_by_itself_at_its_limit_is_judged_by_its_own_end(admin: Wire) -> None:
    for size, cut in ((1000, None), (1001, "limit")):
        job = await finished(
            admin,
            *("head", "-c", str(size), "/dev/zero"),
            limits={"output_bytes": 1000},
            at_max_output="discard-output",
        )
        assert (job["state"], job["output_cut"]) == ("COMPLETED", cut)


# --- the disk -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_free", "policy", "state", "reason"),
    [
        (0, "discard-output", "COMPLETED", None),
        (0, "stop", "FAILED", "output"),
        (2, "discard-output", "COMPLETED", None),
    ],
)
async def test_full_disk_is_one_jobs_matter(
    open_directory: Directory, keep_free: int, policy: str, state: str, reason: str | None
) -> None:
    directory = open_directory()
    settings = {"on_disk_full": policy, "keep_free": keep_free}
    async with small_disk(directory, "8m"), serving(directory, **settings) as (service, admin):
        quiet = await admin.start("sh", "-c", "echo before; read x < /dev/fd/3 3<&1; sleep 600")
        script = "head -c 20000000 /dev/zero" + ("; sleep 600" if policy == "stop" else "")
        with trio.fail_after(60):
            job = await finished(admin, "sh", "-c", script)
        assert (job["state"], job["reason"], job["output_cut"]) == (state, reason, "disk")
        kept, lost = int(str(job["stdout_bytes"])), int(str(job["discarded_bytes"]))
        assert (8 - keep_free - 1) << 20 < kept <= (8 - keep_free) << 20
        if policy == "discard-output":
            assert kept + lost == 20_000_000
        # The log of what was kept is whole, the service goes on, and so do other jobs.
        result = await admin.call("job.log", id=job["id"])
        out, _, _ = await admin.output(result["subscription"])
        assert out == bytes(kept)
        assert (await admin.call("job.status", id=quiet))["output_cut"] is None
        await admin.call("job.stop", id=quiet)
        # With room again the next job's output is kept.
        await admin.call("job.remove", id=job["id"])
        text, _, later = await admin.run("echo", "later")
        assert (text, later["output_cut"]) == ("later\n", None)
        assert "Traceback" not in service.log_text()


async def test_limit_on_all_output_first_removes_what_is_old(open_directory: Directory) -> None:
    async with serving(open_directory(), max_total_output=4, keep_free=0) as (_, admin):
        ids = [
            int(str((await finished(admin, "head", "-c", "1000000", "/dev/zero"))["id"]))
            for _ in range(3)
        ]
        last = await finished(admin, "head", "-c", "3000000", "/dev/zero")
        assert (last["state"], last["output_cut"]) == ("COMPLETED", None)
        first = await admin.call("job.status", id=ids[0])
        assert first["output_removed_at"] is not None
        with pytest.raises(Refused, match="not kept any more"):
            await admin.call("job.log", id=ids[0])
        over = await finished(admin, "head", "-c", "9000000", "/dev/zero")
        assert (over["state"], over["output_cut"]) == ("COMPLETED", "total")
        kept = int(str(over["stdout_bytes"]))
        assert 3 << 20 < kept <= 4 << 20
        assert kept + int(str(over["discarded_bytes"])) == 9_000_000


# --- retention ------------------------------------------------------------------------------


def spools(service: EmbeddedService) -> list[int]:
    return sorted(
        int(entry.name)
        for entry in (service.directory / "state/service/spool").iterdir()
        if not entry.name.endswith(".removed")
    )


async def test_retention_follows_the_configuration_but_not_under_a_follower(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    async with serving(directory, keep_output_jobs=2) as (service, admin):
        first = await finished(admin, "head", "-c", "300000", "/dev/zero")
        delivery = {"credit_bytes": 1000}
        result = await admin.call("job.log", id=first["id"], delivery=delivery)
        await admin.notes(result["subscription"]).receive()
        for _ in range(4):
            await finished(admin, "echo", "x")
        await until(lambda: spools(service) == [1, 4, 5])
        await admin.call("job.unfollow", subscription=result["subscription"])
        await finished(admin, "echo", "x")
        await until(lambda: spools(service) == [5, 6])
        listed = await admin.call("job.list")
        assert isinstance(listed["jobs"], list)
        assert len(listed["jobs"]) == 6  # records stay
    async with serving(directory, keep_output_jobs=1) as (service, admin):
        await until(lambda: spools(service) == [6])  # at start


async def test_remove_takes_a_job_away(open_directory: Directory) -> None:
    async with serving(open_directory()) as (service, admin):
        job = (await finished(admin, "head", "-c", "1000", "/dev/zero"))["id"]
        removed = await admin.call("job.remove", id=job)
        assert removed["jobs"] == [job]
        assert int(str(removed["bytes"])) >= 1000
        assert spools(service) == []
        for method in ("job.status", "job.log", "job.remove"):
            with pytest.raises(Refused, match="no such job"):
                await admin.call(method, id=job)
        live = await admin.start("sleep", "600")
        with pytest.raises(Refused, match="has not ended"):
            await admin.call("job.remove", id=live)
        await admin.call("job.remove", id=live, force=True)
        assert spools(service) == []
        assert (await admin.call("job.list"))["jobs"] == []


async def test_follower_of_a_removed_job_gets_all_of_it(admin: Wire) -> None:
    job = (await finished(admin, "head", "-c", "300000", "/dev/zero"))["id"]
    result = await admin.call("job.log", id=job, delivery={"credit_bytes": 1000})
    number = result["subscription"]
    with pytest.raises(Refused, match="being read"):
        await admin.call("job.remove", id=job)
    await admin.call("job.remove", id=job, force=True)
    await admin.call("job.credit", subscription=number, bytes=1 << 20)
    size = 0
    notes = admin.notes(number)
    while "data" in (params := (await notes.receive())["params"]):  # type: ignore[operator]
        assert isinstance(params, dict)
        size += len(base64.b64decode(params["data"]))
    assert isinstance(params, dict)
    assert (size, params["job"]["id"]) == (300_000, job)
    assert params["error"] == {
        "name": "not_found",
        "message": f"cannot follow job {job} any more: it was removed",
    }


async def test_viewer_removes_nothing(admin: Wire, viewer: Wire) -> None:
    job = (await finished(admin, "true"))["id"]
    for method, params in (("job.remove", {"id": job}), ("job.prune", {"keep_jobs": 0})):
        with pytest.raises(Refused, match="may not remove"):
            await viewer.call(method, **params)


# --- the command line -----------------------------------------------------------------------


async def test_command_line_limits_removes_and_prunes(open_directory: Directory) -> None:
    async with serving(open_directory()) as (service, admin):

        async def call(*words: str, binary: str = "worker-cli") -> tuple[str, str, int]:
            done = await trio.run_process(
                [*program(binary), *words],
                env={**os.environ, **service.environment()},
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
            return done.stdout.decode(), done.stderr.decode(), done.returncode

        out, said, code = await call("run", "-f", "--max-output=1K", "head", "-c2000", "/dev/zero")
        assert (len(out), code) == (1024, 0)
        assert (
            "job 1: 976 B of its output were not kept: it reached its limit on output of 1 KiB"
            in said
        )
        assert "976 B of its output were not kept" in (await call("log", "1"))[1]
        assert "976 B not kept (it reached its limit" in (await call("status", "1"))[0]
        for _ in range(3):
            await finished(admin, "echo", "x")
        assert (await call("rm", "1", "99"))[::2] == ("1\n", 66)
        assert (await call("prune", "--keep", "2"))[0].startswith("removed the output of 1 jobs")
        assert spools(service) == [3, 4]
        live = await admin.start("sleep", "600")
        config = str(service.directory / "worker.toml")
        out, said, code = await call("prune", "--config", config, "--keep=0", binary="worker")
        assert (out.startswith("removed the output of 2 jobs"), code) == (True, 0), said
        assert spools(service) == [live]
        await finished(admin, "echo", "x")  # at whose end the service finds out
        with trio.fail_after(20):
            while not (await admin.call("job.status", id=4))["output_removed_at"]:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await admin.call("job.stop", id=live)


async def prune_on_the_host(directory: Path) -> str:
    done = await trio.run_process(
        [*program("worker"), "prune", "--config", str(directory / "worker.toml"), "--keep=0"],
        capture_stdout=True,
    )
    return done.stdout.decode()


async def test_what_was_pruned_without_the_service_is_known_from_its_start(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    async with serving(directory) as (_, admin):
        jobs = [(await finished(admin, "echo", "x"))["id"] for _ in range(2)]
    assert (await prune_on_the_host(directory)).startswith("removed the output of 2 jobs")
    async with serving(directory) as (_, admin):
        latest = (await admin.call("job.list"))["jobs"]
        assert isinstance(latest, list)
        assert [job["id"] for job in latest if job["output_removed_at"]] == jobs[::-1]


async def test_what_was_pruned_beside_the_service_is_noted_when_it_is_looked_at(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    async with serving(directory) as (_, admin):
        first, second, third = [(await finished(admin, "echo", "x"))["id"] for _ in range(3)]
        assert (await prune_on_the_host(directory)).startswith("removed the output of 3 jobs")
        seen = (await admin.call("job.status", id=first))["output_removed_at"]
        assert seen is not None
        with pytest.raises(Refused, match=r"any more since .*; it was removed on request or by"):
            await admin.call("job.log", id=second)
        assert (await admin.call("job.remove", id=third))["bytes"] == 0
        assert await admin.call("job.prune", keep_jobs=0) == {"jobs": [], "bytes": 0}
    async with serving(directory) as (_, admin):
        assert (await admin.call("job.status", id=first))["output_removed_at"] == seen
        with pytest.raises(Refused, match="no such job"):
            await admin.call("job.status", id=third)
