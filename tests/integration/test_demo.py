"""The demonstration takes its service along, however it is ended."""

import signal
import subprocess
from pathlib import Path

import pytest

from jobworker.cli.embedded import program

from .conftest import left_behind, until


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ended_demonstration_leaves_nothing(number: signal.Signals) -> None:
    command = [*program("worker"), "demo", "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: ASYNC220
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        (ca,) = [line for line in lines if "WORKER_CA_PATH" in line]
        directory = Path(ca.strip().partition("=")[2]).parents[1]
        assert directory.is_dir()
        process.send_signal(number)
        await until(lambda: process.poll() is not None)
    assert process.returncode == 128 + number
    assert not directory.exists()
    directory.joinpath("state/scratch").mkdir(parents=True)  # where it looks for files
    try:
        assert left_behind(directory) == []
    finally:
        for path in (directory / "state/scratch", directory / "state", directory):
            path.rmdir()
