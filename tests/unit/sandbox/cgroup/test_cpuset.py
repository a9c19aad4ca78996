"""The cpuset controller's files, both versions of them: what is asked for holds or is refused."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.errors import SandboxError
from jobworker.sandbox.cgroup.cpuset import limit_cores


@pytest.fixture
def group(tmp_path: Path) -> Iterator[int]:
    """A group that has the cores 0 to 3, and a scope in it: plain files."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "cpuset.cpus").touch()
    (tmp_path / "job" / "cpuset.cpus.effective").write_text("1-2\n")
    top = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield top
    os.close(top)


@pytest.mark.parametrize("v2", [False, True])
def test_cores_are_written_and_those_that_are_missing_refused(
    group: int, v2: bool, tmp_path: Path
) -> None:
    limit_cores(group, "job", "1,2", "0-3", v2=v2)
    assert (tmp_path / "job" / "cpuset.cpus").read_text().strip() == "1,2"
    with pytest.raises(SandboxError, match="the cores here are 0-3"):
        limit_cores(group, "job", "1-4", "0-3", v2=v2)


def test_cores_that_the_kernel_does_not_give_are_refused_on_v2(group: int) -> None:
    with pytest.raises(SandboxError, match="the kernel uses '1-2'"):
        limit_cores(group, "job", "0-1", "0-3", v2=True)


def test_all_cores_are_given_back(group: int, tmp_path: Path) -> None:
    limit_cores(group, "job", "", "0-3", v2=False)
    assert (tmp_path / "job" / "cpuset.cpus").read_text().strip() == "0-3"
