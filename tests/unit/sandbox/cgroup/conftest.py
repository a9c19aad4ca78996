"""Processes in real control groups."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator

import pytest

from jobworker.sandbox.cgroup import files
from jobworker.sandbox.cgroup.tree import Tree

Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that sleep, and kills them in the end."""
    with contextlib.ExitStack() as processes:

        def start() -> subprocess.Popen[bytes]:
            made = processes.enter_context(subprocess.Popen(["sleep", "600"]))
            processes.callback(made.kill)
            return made

        yield start


@pytest.fixture
def process(start: Start) -> subprocess.Popen[bytes]:
    return start()


def enter(tree: Tree, name: str, process: subprocess.Popen[bytes]) -> None:
    """Move a process into a scope."""
    for top in tree.tops:
        files.write(top, f"{name}/cgroup.procs", str(process.pid))


def holders(tree: Tree, name: str) -> int:
    """In how many hierarchies there is such a group."""
    return sum(files.exists(top, name) for top in tree.tops)
