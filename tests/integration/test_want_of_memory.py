"""What is said of a job that lost processes for want of memory is what the kernel knows."""

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.cli.worker_cli import render
from jobworker.model.job import JobRecord
from jobworker.serialization.convert import structure

from .conftest import running, until
from .test_kernel_memory import NETLINK
from .wire import Json, Wire, open_wire

MIB = 1 << 20
GROUP = f"jobworker-test-above-{os.getpid()}"
HOG = "x = b'x' * 300_000_000; print('got it')"
"""Takes more than there is."""
BUSY = """
import os, time
with open("/workspace/big", "wb") as file:
    for _ in range(150):
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())
x = b"x" * 75_000_000
print("got it")
"""
"""Meets its limit by what the kernel can give back, and never by what it needs."""
ABOVE = "the host, or a control group above the job's, had none left"


@pytest.fixture(scope="module")
def narrow(open_directory: Callable[[], Path]) -> Iterator[EmbeddedService]:
    """A service whose jobs stand in a group that has 128 MiB for all of them together."""
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces and control groups")
    memory = Path("/sys/fs/cgroup/memory")
    if not (memory / "memory.oom_control").exists():
        pytest.skip("needs cgroup v1's memory controller: v2 ends a job as a whole")
    mounts = {path.resolve() for path in Path("/sys/fs/cgroup").iterdir() if path.is_dir()}
    tops = [path / GROUP for path in mounts]
    for top in tops:
        top.mkdir()
        with suppress(OSError):  # a cpuset begins empty, and takes no process then
            for file in ("cpuset.cpus", "cpuset.mems"):
                if (top / file).exists():
                    (top / file).write_text((top.parent / file).read_text())
    try:
        (memory / GROUP / "memory.limit_in_bytes").write_text(str(128 * MIB))
        changes: dict[str, dict[str, object]] = {
            "cgroup": {"parent": GROUP},
            "worker": {"max_concurrent_jobs": 4},
        }
        with running(open_directory(), changes) as made:
            yield made
    finally:
        for top in tops:
            top.rmdir()


@pytest.fixture
async def wire(narrow: EmbeddedService) -> AsyncIterator[Wire]:
    async with open_wire(narrow) as wire:
        yield wire


def said(job: Json) -> str:
    """What `worker-cli run -f` says of a job's end."""
    return "\n".join(render.ending(structure(JobRecord, job)))


@pytest.mark.parametrize("init", [False, True])
async def test_limit_of_its_own_ends_the_job_as_a_whole(wire: Wire, init: bool) -> None:
    script = f'python3 -c "{HOG}" & wait; sleep 60'
    limits = {"memory_bytes": 32 * MIB}
    _, _, job = await wire.run("sh", "-c", script, limits=limits, init=init)
    assert (job["reason"], job["detail"]) == ("oom", "")
    assert "it went over its memory limit of 32 MiB" in said(job)


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("megabytes", [0, 1024])
async def test_group_above_that_is_full_is_not_the_jobs_limit(
    wire: Wire, megabytes: int, init: bool
) -> None:
    limits = {"memory_bytes": megabytes * MIB}
    out, _, job = await wire.run("python3", "-c", HOG, limits=limits, init=init)
    assert (job["state"], job["reason"], job["signal"], out) == ("FAILED", "oom", 9, "")
    assert job["detail"] == f"it was killed for memory: {ABOVE}"
    assert f"was ended: it was killed for memory: {ABOVE}" in said(job)
    assert "limit of" not in said(job)


async def test_limit_that_was_met_by_files_did_not_end_the_job(wire: Wire) -> None:
    neighbour = f"import time; x = b'x' * {58 * MIB}; print('held', flush=True); time.sleep(60)"
    result = await wire.call("job.run", job={"command": ["python3", "-c", neighbour]}, follow={})
    async for _ in wire.notes(result["subscription"]):
        break  # it has what it takes
    _, _, job = await wire.run("python3", "-c", BUSY, limits={"memory_bytes": 92 * MIB})
    assert (job["reason"], job["detail"]) == ("oom", f"it was killed for memory: {ABOVE}")
    first = result["job"]
    assert isinstance(first, dict)
    await wire.call("job.stop", id=first["id"], signal="KILL")
    await wire.call("job.wait", id=first["id"])


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("code", [0, 3])
async def test_program_that_goes_on_has_an_end_of_its_own(
    wire: Wire, code: int, init: bool
) -> None:
    script = f'python3 -c "{HOG}"; python3 -c "{HOG}"; echo went on; exit {code}'
    out, _, job = await wire.run("sh", "-c", script, limits={"memory_bytes": 0}, init=init)
    assert out == "went on\n"
    assert job["state"] == ("FAILED" if code else "COMPLETED")
    assert (job["reason"], job["exit_code"]) == ("exit" if code else None, code)
    words = f"2 of its processes were killed for memory: {ABOVE}"
    assert job["detail"] == words
    assert f"job {job['id']}: {words}" in said(job)


async def test_signal_from_elsewhere_is_told_as_a_signal(wire: Wire) -> None:
    mark = f"60.{os.getpid()}"
    number = await wire.start("sleep", mark)
    found: list[int] = []

    def is_there() -> bool:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if path.read_bytes() == f"sleep\0{mark}\0".encode():
                    found.append(int(path.parent.name))
        return bool(found)

    await until(is_there)
    os.kill(found[0], signal.SIGKILL)
    job = await wire.call("job.wait", id=number)
    assert (job["reason"], job["signal"], job["detail"]) == ("signal", 9, "")
    assert "was ended by signal 9 (SIGKILL)" in said(job)


async def test_kernel_memory_is_named(wire: Wire) -> None:
    _, _, job = await wire.run("python3", "-c", NETLINK, limits={"memory_bytes": 0})
    assert (job["reason"], job["signal"]) == ("oom", 9)
    assert "it held more of the kernel's own than a job may" in str(job["detail"])
    assert "it held more of the kernel's own than a job may" in said(job)
    assert "limit of" not in said(job)
