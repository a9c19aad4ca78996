"""What the launcher does for a job also where it has no descriptor left."""

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobworker.sandbox.cgroup_none import NoTree
from jobworker.sandbox.cgroups import Usage
from jobworker.sandbox.children import Child, Exit
from jobworker.sandbox.launch import exit_from
from jobworker.sandbox.launcher_jobs import deliver, listed
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


def test_usage_that_cannot_be_read_is_none_and_not_zeros(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    child.job, child.exit, child.end_is_known = 1, Exit(0, None), True

    def refuse() -> Usage:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(child.scope, "usage", refuse)
    told = listed(child)
    assert told["usage"] == Usage()._asdict(), "an earlier service knows numbers only"
    assert exit_from({**told, "code": 0, "signal": None}).usage is None
    monkeypatch.undo()
    assert exit_from({**listed(child), "code": 0, "signal": None}).usage is not None
