"""A service whose limit of processes leaves it no thread waits for one, and fails nothing."""

import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import trio

from ..services import open_embedded
from .conftest import until
from .wire import open_wire


def limit_processes(pid: int, limit: int) -> None:
    """Set the soft limit of processes and threads of a process's user, as that user."""
    user = os.stat(f"/proc/{pid}").st_uid
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    words = ["prlimit", "--pid", str(pid), f"--nproc={limit}:{hard}"]
    subprocess.run(words, check=True, user=user, group=user, extra_groups=())


def threads(pid: int) -> int:
    """How many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


async def test_service_that_gets_no_more_threads_makes_do_with_those_it_has(
    open_directory: Callable[[], Path],
) -> None:
    """Idle threads end after ten seconds; then there are fewer than many jobs ask for at once."""
    settings = {"worker": {"max_concurrent_jobs": 30}}
    async with open_embedded(open_directory(), settings) as service, open_wire(service) as wire:
        pid = service.process.pid
        writing = await wire.start("sh", "-c", "sleep 12; seq 100000")
        await until(lambda: threads(pid) <= 4, seconds=30)
        limit_processes(pid, 1)
        done: list[tuple[str, object]] = []

        async def run(number: int) -> None:
            text, _, record = await wire.run("echo", str(number))
            done.append((text, record["state"]))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(run, number)
        assert sorted(done) == sorted((f"{number}\n", "COMPLETED") for number in range(20))
        record = await wire.call("job.wait", id=writing)
        assert (record["state"], record["stdout_bytes"]) == ("COMPLETED", 588_895)
        assert "refuses a thread" in service.log_text()
        assert "incident" not in service.log_text()
