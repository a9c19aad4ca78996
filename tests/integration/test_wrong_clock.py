"""A service whose time of day is wrong by 40 days, at its start and while it runs, loses nothing.

No namespace has a time of day of its own (time_namespaces(7)), so the service gets a library in
front of libc's that moves what clock_gettime(2) says of CLOCK_REALTIME by what a file says.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import program
from jobworker.errors import HostUnsupported
from jobworker.jobs.age_clock import FILE

from ..conftest import compiler
from ..services import open_embedded
from .conftest import left_behind
from .test_takeover import start, until_bigger
from .wire import Wire, open_wire

SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    long result = syscall(SYS_clock_gettime, clock, now);
    const char *path = getenv("CLOCK_MOVED_BY");
    if (result == 0 && clock == CLOCK_REALTIME && path) {
        char text[32] = {0};
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file >= 0) {
            if (read(file, text, sizeof text - 1) > 0)
                now->tv_sec += atol(text);
            close(file);
        }
    }
    return result;
}
"""
MONTH = 30 * 24 * 3600
DAYS = 40 * 24 * 3600
AGE = ["--older-than=30d"]
NOTHING = "removed the output of 0 jobs, 0 B\n"
EXTRA: dict[str, dict[str, object]] = {
    "worker": {"keep_output_age": "30d", "max_concurrent_jobs": 1, "job_timeout": "1h"}
}


@pytest.fixture
def moved_by(open_directory: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says by how many seconds the services' time of day is wrong."""
    directory = open_directory()
    (directory / "shim.c").write_text(SHIM)
    library, file = directory / "shim.so", directory / "moved-by"
    build = [compiler(), "-shared", "-fPIC", "-o", str(library), str(directory / "shim.c")]
    subprocess.run(build, check=True)
    file.write_text("0")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("CLOCK_MOVED_BY", str(file))
    return file


async def prune(wire: Wire) -> object:
    """What goes by the configuration, and by an age that the caller names."""
    gone = [await wire.call("job.prune"), await wire.call("job.prune", older_than_seconds=MONTH)]
    return gone[0]["jobs"] or gone[1]["jobs"]


def prune_beside(directory: Path, *options: str) -> str:
    """Run `worker prune` on the service's files: what it says."""
    command = [*program("worker"), "prune", "--config", str(directory / "worker.toml")]
    return subprocess.run(
        [*command, *options], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    ).stdout


@pytest.mark.parametrize("moved", [DAYS, -DAYS])
async def test_wrong_clock_deletes_and_ends_nothing(
    open_directory: Callable[[], Path], moved_by: Path, moved: int
) -> None:
    directory = open_directory()
    async with open_embedded(directory, EXTRA) as service, open_wire(service) as wire:
        ended = await wire.start("echo", "kept")
        before = await wire.call("job.wait", id=ended)
        running = await start(wire, "echo up; exec sleep 100000")
        await until_bigger(wire, running, 0)
        waiting = await wire.start("echo", "waited")
        assert await prune(wire) == []
        moved_by.write_text(str(moved))
        assert await prune(wire) == []
        states = [(await wire.call("job.status", id=n))["state"] for n in (running, waiting)]
        assert states == ["RUNNING", "PENDING"]
        await wire.call("job.stop", id=running)
        with trio.fail_after(20):
            late = await wire.call("job.wait", id=waiting)
        assert str(late["ended_at"])[:7] != str(before["ended_at"])[:7], "the clock is wrong"
        assert await prune(wire) == []
    if moved < 0:  # its certificates are not valid yet
        with pytest.raises(HostUnsupported, match="check the clock"):
            async with open_embedded(directory, EXTRA):
                pass
        moved_by.write_text("0")
    async with open_embedded(directory, EXTRA) as service, open_wire(service) as wire:
        assert await prune(wire) == []
        moved_by.write_text("0")
        assert await prune(wire) == []
    async with open_embedded(directory, EXTRA) as service, open_wire(service) as wire:
        assert await wire.call("job.status", id=ended) == {**before, "warnings": []}
        for job, words in ((ended, b"kept\n"), (waiting, b"waited\n")):
            result = await wire.call("job.log", id=job)
            assert (await wire.output(result["subscription"]))[0] == words
    assert left_behind(directory) == []


async def test_prune_in_its_own_process_doubts_the_clock_too(
    open_directory: Callable[[], Path], moved_by: Path
) -> None:
    directory = open_directory()
    async with open_embedded(directory, EXTRA) as service, open_wire(service) as wire:
        job = await wire.start("echo", "kept")
        await wire.call("job.wait", id=job)
        moved_by.write_text(str(DAYS))
        for options in ([], AGE):
            said = await trio.to_thread.run_sync(prune_beside, directory, *options)
            assert said == NOTHING
    assert prune_beside(directory, *AGE) == NOTHING
    (directory / "state" / "service" / FILE).unlink()  # then the newest record is the witness
    assert prune_beside(directory, *AGE) == NOTHING
    moved_by.write_text("0")
    assert prune_beside(directory, "--older-than=0").startswith("removed the output of 1 jobs, ")
