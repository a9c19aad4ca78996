"""Demonstrations run beside each other, and each takes its service along, however it is ended."""

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import program

from .conftest import child_of, left_behind, until

Demo = subprocess.Popen[str]


async def test_demonstrations_share_no_ids_and_leave_nothing() -> None:
    with ExitStack() as stack:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        demos = [stack.enter_context(demonstration()) for _ in numbers]  # both start at once
        directories, ranges = [], []
        for demo in demos:
            names = await trio.to_thread.run_sync(names_from, demo)
            directories.append(Path(names["WORKER_CA_PATH"]).parents[1])
            ranges.append(await ids_of_a_job(names))
        assert all(directory.is_dir() for directory in directories)
        assert set(ranges[0]).isdisjoint(ranges[1])
        for demo, number in zip(demos, numbers, strict=True):
            os.killpg(demo.pid, number)  # as a terminal does
        for demo, number in zip(demos, numbers, strict=True):
            await until(lambda demo=demo: demo.poll() is not None)  # type: ignore[misc]
            assert demo.returncode == 128 + number
    for directory in directories:
        assert nothing_left(directory)


async def test_killed_demonstration_takes_its_service_and_jobs_along() -> None:
    with demonstration() as demo:
        names = await trio.to_thread.run_sync(names_from, demo)
        directory = Path(names["WORKER_CA_PATH"]).parents[1]
        await trio.run_process(
            [*program("worker-cli"), "run", "sleep", "1000"],
            env={**os.environ, **names},
            capture_stdout=True,
        )
        demo.kill()
        await until(lambda: not directory.exists())
    await until(lambda: nothing_left(directory))  # the guard has yet to end


@pytest.mark.parametrize("generation", [1, 2], ids=["guard", "service"])
async def test_demonstration_whose_service_is_lost_says_so(generation: int) -> None:
    with demonstration() as demo:
        names = await trio.to_thread.run_sync(names_from, demo)
        victim = demo.pid
        for _ in range(generation):
            victim = child_of(victim)
        os.kill(victim, signal.SIGKILL)
        await until(lambda: demo.poll() is not None, 60)
        assert demo.returncode == 1
        assert demo.stderr is not None
        assert "cannot keep the service running: it or its guard ended with code 137" in (
            demo.stderr.read()
        )
    directory = Path(names["WORKER_CA_PATH"]).parents[1]
    await until(lambda: nothing_left(directory))  # the launcher ends after its service


async def test_ignored_hangup_leaves_the_demonstration_alone() -> None:
    with demonstration("nohup") as demo:
        names = await trio.to_thread.run_sync(names_from, demo)
        os.killpg(demo.pid, signal.SIGHUP)
        assert await ids_of_a_job(names)
        assert demo.poll() is None


def nothing_left(directory: Path) -> bool:
    """Whether the directory is gone, and all that its service had elsewhere."""
    assert not directory.exists()
    directory.joinpath("state/scratch").mkdir(parents=True)  # where it looks for files
    try:
        return left_behind(directory) == []
    finally:
        for path in (directory / "state/scratch", directory / "state", directory):
            path.rmdir()


@contextmanager
def demonstration(*before: str) -> Iterator[Demo]:
    command = [*before, *program("worker"), "demo", "--serve"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as demo:
        try:
            yield demo
        finally:
            demo.terminate()


def names_from(demo: Demo) -> dict[str, str]:
    """The variables that a demonstration says are to be exported."""
    assert demo.stdout is not None
    lines = [demo.stdout.readline() for _ in range(4)]
    told = [shlex.split(line)[1].partition("=") for line in lines]
    return {name: value for name, _, value in told}


async def ids_of_a_job(names: dict[str, str]) -> range:
    """Which user ids of the host a job of that service has."""
    done = await trio.run_process(
        [*program("worker-cli"), "run", "--follow", "cat", "/proc/self/uid_map"],
        env={**os.environ, **names},
        capture_stdout=True,
    )
    inside, first, count = map(int, done.stdout.split())
    assert inside == 0
    return range(first, first + count)
