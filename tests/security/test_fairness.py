"""The short form of `make bench-fairness`: a flood harms neither a quiet client nor the service.

Times are those of a busy machine, so their bounds are generous.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from bench.fairness import MB, PEAK_BYTES, flood, percentile, place

from jobworker.cli.worker import embedded_service
from jobworker.cli.worker.embedded_service import program

from ..integration.outside import open_launcher, settings_with
from ..integration.wire import open_wire
from ..services import open_embedded

pytestmark = pytest.mark.alone

MANY_MS = 2000.0


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with place() as made:
        yield made


LONG = [pytest.param(name, marks=pytest.mark.soak) for name in ("unread", "garbage", "connects")]


@pytest.mark.parametrize("name", ["follows", "ends", "fragments", *LONG])
async def test_flood_leaves_a_quiet_client_in_peace(directory: Path, name: str) -> None:
    seconds = 6 if name == "follows" else 1.5
    for times in (1, 4, 16):  # on a busy machine a flood takes seconds to begin
        row = await flood(directory, name, times * seconds, idle_seconds=0.5)
        if row.asked:
            break
    assert row.asked
    assert percentile(row.flooded.hello, 99) < MANY_MS
    assert percentile(row.flooded.run, 99) < 5 * MANY_MS
    assert row.peak_bytes < PEAK_BYTES
    if name == "follows":  # they held 190 MB: each what it had sent last, until its next turn
        assert row.peak_bytes < row.start_bytes + 80 * MB
        assert row.after_bytes < row.start_bytes + 40 * MB
    assert row.descriptors_left <= 0


GROUPS = Path("/sys/fs/cgroup/memory")


@contextmanager
def memory_group(size: int) -> Iterator[Path]:
    """A control group of that many bytes of memory."""
    if not (GROUPS / "memory.limit_in_bytes").exists():
        pytest.skip("needs cgroup v1 with a memory hierarchy")
    group = GROUPS / f"jobworker-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(size))
        yield group
    finally:
        group.rmdir()


async def test_service_in_a_small_group_outlives_many_followers(
    open_directory: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = open_directory()
    with open_launcher(directory), memory_group(150 * MB) as group:
        enter = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
        monkeypatch.setattr(embedded_service, "program", lambda name: [*enter, *program(name)])
        async with open_embedded(directory, settings_with(directory, {})) as service:
            assert str(service.process.pid) in (group / "cgroup.procs").read_text().split()
            certs = directory / "certs"
            flood_for = [
                sys.executable,
                "-m",
                "bench.floods",
                "follows",
                service.address,
                str(certs),
            ]
            for seconds in ("6", "30"):  # the second one on a busy machine
                done = await trio.run_process([*flood_for, seconds], capture_stdout=True)
                begun = int(done.stdout.split()[1])
                if begun > 200:
                    break
            assert begun > 200, "some have read all of it, since there are never more at a time"
            async with open_wire(service) as wire:
                assert (await wire.run("echo", "on"))[0] == "on\n"
        assert "oom_kill 0" in (group / "memory.oom_control").read_text().splitlines()
