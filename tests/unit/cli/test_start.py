"""Ctrl-C ends a program in silence while Python loads it and when it has done its work."""

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
INTERRUPTED = """
import os, signal, sys
start, where = sys.argv[1:3]
del sys.argv[1:3]
if where == "ignored":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == where or where == "ignored":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
if where == "exit":
    import atexit
    atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
from jobworker.cli import start as begin
getattr(begin, start)()
"""


def interrupted(start: str, where: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED, start, where, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("start", "where"),
    [
        ("worker_cli", "jobworker.cli.worker_cli.main"),
        ("worker_cli", "trio"),
        ("worker_cli", "jobworker.errors"),
        ("worker_cli", "exit"),
        ("worker", "jobworker.cli.worker.main"),
        ("worker", "asyncclick"),
        ("worker", "exit"),
    ],
)
def test_interrupt_while_python_loads_or_unloads_is_silent(start: str, where: str) -> None:
    done = interrupted(start, where, "--version")
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


def test_interrupt_that_is_ignored_stays_so() -> None:
    done = interrupted("worker_cli", "ignored", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("worker-cli")


def test_installed_programs_begin_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {
        "worker-cli": "jobworker.cli.start:worker_cli",
        "worker": "jobworker.cli.start:worker",
    }
