"""What the launcher does for a job also where it has no descriptor left."""

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobworker.sandbox.cgroup_none import NoTree
from jobworker.sandbox.children import Child
from jobworker.sandbox.launcher_jobs import deliver
from jobworker.sandbox.plan import Slot


@pytest.fixture
def child() -> Iterator[Child]:
    """A child that ignores SIGUSR1, and has no handler for any signal."""
    script = "trap '' USR1; echo; read x"
    pipe = subprocess.PIPE
    with subprocess.Popen(["sh", "-c", script], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        made = Child(Slot("job", 1, 1), 0, NoTree("none", "").create("job"))
        made.pid, made.pidfd = process.pid, os.pidfd_open(process.pid)
        yield made
        os.close(made.pidfd)
        process.kill()


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Have this process open nothing while the block lasts."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_signal_that_would_have_no_effect_is_not_sent(child: Child) -> None:
    assert deliver(child, signal.SIGUSR1), "ignored on purpose"
    assert not deliver(child, signal.SIGTERM)


def test_signal_is_sent_where_nothing_tells_whether_it_is_heeded(child: Child) -> None:
    with no_descriptors():
        assert deliver(child, signal.SIGTERM)
