"""A host without control groups: no limit is left out silently, and nothing is measured."""

import os
from pathlib import Path

import pytest

from jobworker.errors import SandboxError
from jobworker.sandbox.cgroup import files
from jobworker.sandbox.cgroup.accounting import ScopeLimits, ScopeUsage
from jobworker.sandbox.cgroup.none import NoTree


@pytest.mark.parametrize(
    "limits",
    [
        ScopeLimits(cpu_percent=1),
        ScopeLimits(memory_bytes=1),
        ScopeLimits(io_bps=1),
        ScopeLimits(pids=1),
        ScopeLimits(cores="0"),
    ],
    ids=str,
)
def test_every_limit_is_refused(limits: ScopeLimits) -> None:
    with pytest.raises(SandboxError, match=r"cannot limit \w+: the controller is not in use"):
        NoTree("none", "").create("job").arm(limits)


def test_job_without_limits_runs_unmeasured() -> None:
    tree = NoTree("none", "it is an ordinary user's")
    scope = tree.create("job")
    scope.arm(ScopeLimits())
    assert scope.usage() == ScopeUsage()
    assert (scope.oom_kills(), scope.is_over_limit()) == (0, False)
    assert (scope.clone_fd, scope.oom_fd) == (None, None)
    scope.kill()
    scope.remove()
    assert tree.missing_features() == (
        "no limit is enforced and no usage is measured: it is an ordinary user's",
    )


def test_directories_that_an_earlier_instance_left_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine/left").mkdir(parents=True)
    top = os.open(tmp_path / "mine", files.DIRECTORY)
    tree = NoTree("mine", "", {"mine": top})
    assert tree.sweep() == ["left"]
    tree.close()
    assert not (tmp_path / "mine").exists()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(top)
