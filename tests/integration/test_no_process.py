"""A launcher that the system gives no process for a while."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from ..conftest import attached_disks
from .conftest import child_of, until
from .outside import open_launcher
from .test_takeover import Settings, serving
from .wire import open_wire

PIDS = Path("/sys/fs/cgroup/pids")
SETTINGS: Settings = {"worker": {"max_concurrent_jobs": 2}, "sandbox": {"spares": 0}}


@contextmanager
def no_more_processes(pid: int) -> Iterator[None]:
    """Let a process have no further child, while the block lasts."""
    if not (PIDS / "cgroup.procs").exists():
        pytest.skip("needs cgroup v1 with a pids hierarchy of its own")
    before = next(
        line.partition("pids:")[2]
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        if ":pids:" in line
    )
    group = PIDS / f"jobworker-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "pids.max").write_text("1")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        (PIDS / before.strip("/") / "cgroup.procs").write_text(str(pid))
        group.rmdir()


async def test_disk_of_a_dead_job_goes_once_there_are_processes_again(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory, SETTINGS) as guard:
        async with serving(directory, SETTINGS) as service, open_wire(service) as wire:
            before = attached_disks()
            job = await wire.start("sleep", "600")
            (disk,) = attached_disks() - before
            with no_more_processes(child_of(guard.pid)):
                record = await wire.call("job.stop", id=job, signal="KILL")
                assert record["state"] == "STOPPED"
                await trio.sleep(1)
                assert disk in attached_disks(), "nobody could let go of it"
            await until(lambda: disk not in attached_disks(), seconds=5)
