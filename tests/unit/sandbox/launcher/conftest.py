"""Children of the launcher with real processes."""

import os
import subprocess
from collections.abc import Callable, Iterator

import pytest

from jobworker.sandbox.cgroup.none import NoTree
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.start.plan import Slot

StartChild = Callable[..., Child]


@pytest.fixture
def start_child() -> Iterator[StartChild]:
    """Starts a command as the first process of a child that has no control group.

    It returns once the command has written a line, if `says` is true.
    """
    processes: list[tuple[subprocess.Popen[bytes], Child]] = []

    def start(*command: str, says: bool = False) -> Child:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command or ("sleep", "600"), stdin=pipe, stdout=pipe)
        assert process.stdout is not None
        if says:
            process.stdout.readline()
        number = len(processes)
        child = new_child(number)
        child.pid, child.pidfd = process.pid, os.pidfd_open(process.pid)
        processes.append((process, child))
        return child

    yield start
    for process, child in processes:
        os.close(child.pidfd)
        with process:
            process.kill()


def new_child(number: int) -> Child:
    """A child that has no process yet."""
    return Child(Slot(f"job-{number}", 1, 1), number, NoTree("none", "").create("job"))
