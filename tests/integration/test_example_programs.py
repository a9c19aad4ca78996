"""The programs of `examples/`, each run as it stands against a real service."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService

from .conftest import until
from .wire import Wire

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 60


def environment(service: EmbeddedService) -> dict[str, str]:
    return {**os.environ, **service.environment()}


async def run(
    service: EmbeddedService, name: str, *arguments: str
) -> "subprocess.CompletedProcess[bytes]":
    with trio.fail_after(SECONDS):
        return await trio.run_process(
            [sys.executable, str(EXAMPLES / name), *arguments],
            env=environment(service),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )


async def printed(service: EmbeddedService, name: str) -> list[str]:
    """The lines of a program that succeeds."""
    done = await run(service, name)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode().splitlines()


async def test_one_command_is_run_with_its_streams_and_exit_code(service: EmbeddedService) -> None:
    done = await run(service, "run_one.py", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


async def test_command_that_does_not_exist_is_told_in_one_line(service: EmbeddedService) -> None:
    done = await run(service, "run_one.py", "no-such-program")
    assert (done.returncode, done.stdout) == (127, b"")
    assert done.stderr.startswith(b"run_one: cannot run 'no-such-program': ")
    assert done.stderr.count(b"\n") == 1


async def test_limits_variables_and_network_reach_the_job(service: EmbeddedService) -> None:
    if shutil.which("slirp4netns") is None:
        pytest.skip("needs slirp4netns")
    assert await printed(service, "limits_and_network.py") == [
        "hello, a token of 13 characters",
        "interfaces: lo tap0",
        "state: COMPLETED",
        "variables: {'GREETING': 'hello'}",
        "secret variables: {'TOKEN': '***'}",
    ]


async def test_following_goes_on_where_the_program_was_killed(
    service: EmbeddedService, admin: Wire, tmp_path: Path
) -> None:
    script = "trap 'echo two; exit' USR1; echo one; while :; do sleep 0.05; done"
    job = await admin.start("sh", "-c", script)
    offset, program = tmp_path / "offset", str(EXAMPLES / "follow_across_restarts.py")
    with trio.fail_after(SECONDS):
        first = await trio.lowlevel.open_process(
            [sys.executable, program, str(job), str(offset)],
            env=environment(service),
            stdout=subprocess.PIPE,
        )
        assert first.stdout is not None
        assert await first.stdout.receive_some() == b"one\n"
        await until(offset.exists)
        assert offset.read_text() == "4"
        first.send_signal(signal.SIGKILL)
        await first.wait()
        await first.stdout.aclose()
        await admin.call("job.stop", id=job, signal="USR1", grace_seconds=30)
    second = await run(service, "follow_across_restarts.py", str(job), str(offset))
    assert (second.returncode, second.stdout) == (0, b"two\n")
    assert second.stderr == f"job {job}: STOPPED\n".encode()
    assert offset.read_text() == "8"


async def test_many_jobs_give_their_results_in_order(service: EmbeddedService) -> None:
    wanted = [f"{number} * {number} = {number * number}" for number in range(1, 13)]
    assert await printed(service, "many_jobs.py") == wanted


async def test_each_end_of_a_job_is_told_apart(service: EmbeddedService) -> None:
    assert await printed(service, "stop_and_timeout.py") == [
        "success: COMPLETED, exit code 0",
        "exit code: FAILED, reason exit, exit code 3",
        "signal: FAILED, reason signal, signal 9",
        "time limit: FAILED, reason timeout, signal 9",
        "stop: STOPPED, signal 9",
        "no program: command_not_found, exit code 127 as of a shell",
        "cancelled wait, then stop: STOPPED",
    ]


async def test_volume_keeps_a_file_for_the_next_job_and_is_removed(
    service: EmbeddedService, admin: Wire
) -> None:
    assert await printed(service, "volumes.py") == [
        "built by the first job",
        "example-builds: 32 MiB",
    ]
    assert "example-builds" not in str(await admin.call("volume.list"))


def test_every_program_has_a_test_and_stands_in_the_list() -> None:
    tests, listed = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    programs = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert len(programs) >= 4
    for name in programs:
        assert f'"{name}"' in tests
        assert f"[{name}]({name})" in listed
