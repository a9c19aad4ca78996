"""A launcher that the system gives no process for a while."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import trio

from .conftest import child_of, disks_of_size, fork_server_of, size_of_this_run, until
from .outside import open_launcher
from .test_takeover import Settings, serving
from .wire import Refused, open_wire

PIDS = Path("/sys/fs/cgroup/pids")
DISK_BYTES = size_of_this_run(44)
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
            job = await wire.start("sleep", "600", limits={"disk_bytes": DISK_BYTES})
            assert disks_of_size(DISK_BYTES) == 1
            with no_more_processes(fork_server_of(child_of(guard.pid))):
                record = await wire.call("job.stop", id=job, signal="KILL")
                assert record["state"] == "STOPPED"
                with pytest.raises(Refused, match=r"list the volumes: the system gives .* process"):
                    await wire.call("volume.list")
                await trio.sleep(1)
                assert disks_of_size(DISK_BYTES), "nobody could let go of it"
            await until(lambda: not disks_of_size(DISK_BYTES))


ONE: Settings = {"worker": {"max_concurrent_jobs": 1}, "sandbox": {"spares": 0}}


async def test_jobs_that_wait_go_on_waiting_where_there_is_no_process_for_them(
    open_directory: Callable[[], Path],
) -> None:
    """They run once there is one; a stop reaches them meanwhile, and whoever comes is told."""
    directory = open_directory()
    with open_launcher(directory, ONE) as guard:
        async with serving(directory, ONE) as service, open_wire(service) as wire:
            running = await wire.start("sleep", "600")
            waiting = [
                await wire.start("sh", "-c", "echo $TOKEN", secret_environment={"TOKEN": str(n)})
                for n in range(4)
            ]
            with no_more_processes(fork_server_of(child_of(guard.pid))):
                await wire.call("job.stop", id=running, signal="KILL")
                await until(lambda: "is tried again" in service.log_text())
                record = await wire.call("job.stop", id=waiting.pop(0))
                assert record["state"] == "STOPPED"
            for number, job in enumerate(waiting, 1):
                record = await wire.call("job.wait", id=job)
                assert record["state"] == "COMPLETED", record
                out, _, _ = await wire.output((await wire.call("job.log", id=job))["subscription"])
                assert out == f"{number}\n".encode()


async def test_job_that_cannot_be_started_is_left_to_the_next_service(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory, ONE) as guard, ExitStack() as stack:
        async with serving(directory, ONE) as service, open_wire(service) as wire:
            running = await wire.start("sleep", "600")
            waiting = await wire.start("echo", "at last")
            stack.enter_context(no_more_processes(fork_server_of(child_of(guard.pid))))
            await wire.call("job.stop", id=running, signal="KILL")
            await until(lambda: "is tried again" in service.log_text())
        stack.close()
        async with serving(directory, ONE) as service, open_wire(service) as wire:
            assert (await wire.call("job.wait", id=waiting))["state"] == "COMPLETED"


HELD_SECONDS = 4.0


async def test_job_ended_when_it_did_and_not_when_its_volume_was_written_out(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory, ONE) as guard:
        async with serving(directory, ONE) as service, open_wire(service) as wire:
            await wire.call("volume.create", name="v", size_bytes=32 << 20)
            job = await wire.start("sleep", "600", volumes=[{"name": "v"}])
            async with trio.open_nursery() as nursery:
                with no_more_processes(fork_server_of(child_of(guard.pid))):
                    nursery.start_soon(partial(wire.call, "job.stop", id=job, signal="KILL"))
                    log = directory / "launcher-log"
                    await until(lambda: "cannot look at the volumes" in log.read_text())
                    held = datetime.now(UTC)
                    await trio.sleep(HELD_SECONDS)
            record = await wire.call("job.wait", id=job)
            ended_at = datetime.fromisoformat(str(record["ended_at"]))
            # What the launcher says takes a moment to arrive: on a busy host tenths of a second.
            assert ended_at < held + timedelta(seconds=HELD_SECONDS / 2)
