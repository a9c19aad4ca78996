"""The limit on open descriptors can be set to what is told, on a host of any fs.nr_open."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

RAISE = """
import resource, sys
from jobworker import descriptor_limit
from jobworker.server.host.process_limits import raise_descriptor_limit
descriptor_limit._NR_OPEN = sys.argv[1]
kernel, set_limit = int(open(sys.argv[1]).read()), resource.setrlimit

def as_the_kernel(kind, limits):
    if kind == resource.RLIMIT_NOFILE and limits[1] > kernel:
        raise ValueError("not allowed to raise maximum limit")
    set_limit(kind, limits)

resource.setrlimit = as_the_kernel
print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_hard_limit_above_the_kernels_is_refused_by_the_kernel() -> None:
    """Also by root: what the program below does in its place."""
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    with pytest.raises(ValueError, match="not allowed to raise maximum limit"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most + 1, most + 1))


def test_limit_is_raised_where_the_kernels_own_is_lower(tmp_path: Path) -> None:
    (tmp_path / "nr_open").write_text("512\n")
    command = [sys.executable, "-c", RAISE, str(tmp_path / "nr_open")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.split() == ["512"] * 3
