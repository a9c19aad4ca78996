"""What scopes write to the kernel's v1 files, and what they read there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from jobworker.errors import HostUnsupported, SandboxError
from jobworker.sandbox.cgroup import files, v1
from jobworker.sandbox.cgroup.accounting import ScopeLimits
from jobworker.sandbox.cgroup.block_devices import Device
from jobworker.sandbox.cgroup.hierarchy import Tree
from jobworker.sandbox.cgroup.scope import JobScope
from jobworker.sandbox.cgroup.v1 import TreeV1

MIB = 1 << 20
HOLDS = "b = b'x' * (24 << 20); print(flush=True); input()"
CPU, MEMORY, IO = (
    pytest.mark.parametrize("tree", [(name, "pids")], indirect=True)
    for name in ("cpu", "memory", "io")
)


@pytest.fixture
def v1_tree(tree: Tree) -> TreeV1:
    if tree.kind == "v2":
        pytest.skip("the kernel has its controllers on cgroup2, and no v1 hierarchy")
    return cast("TreeV1", tree)


@pytest.fixture
def scope(v1_tree: TreeV1) -> Iterator[JobScope]:
    made = v1_tree.create("job")
    yield made
    made.close()


def kept(tree: Tree, controller: str, file: str) -> str:
    """What the kernel has in a file of the scope."""
    return files.read(tree.by_controller[controller], f"job/{file}").strip()


@contextmanager
def holding(scope: JobScope) -> Iterator[None]:
    """Have a process in the scope hold 24 MiB for a while."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", HOLDS],
        stdin=pipe,
        stdout=pipe,
        preexec_fn=lambda: scope.attach_self(cloned=False),  # noqa: PLW1509 - one thread only
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


@CPU
def test_processor_time_is_limited_in_periods_of_100_ms(v1_tree: TreeV1, scope: JobScope) -> None:
    scope.arm(ScopeLimits(cpu_percent=150))
    assert kept(v1_tree, "cpu", "cpu.cfs_period_us") == "100000"
    assert kept(v1_tree, "cpu", "cpu.cfs_quota_us") == "150000"
    scope.arm(ScopeLimits())
    assert kept(v1_tree, "cpu", "cpu.cfs_quota_us") == "-1"


@CPU
def test_processor_time_is_counted(v1_tree: TreeV1, scope: JobScope) -> None:
    scope.arm(ScopeLimits())
    before = scope.usage().cpu_ns
    with holding(scope):
        assert scope.usage().cpu_ns > before


def test_processes_are_limited_and_counted(v1_tree: TreeV1, scope: JobScope) -> None:
    scope.arm(ScopeLimits(pids=7))
    assert kept(v1_tree, "pids", "pids.max") == "7"
    with holding(scope):
        assert scope.usage().pids == 1
    scope.arm(ScopeLimits())
    assert kept(v1_tree, "pids", "pids.max") == "max"


@MEMORY
def test_memory_is_limited_to_whole_pages_with_swap_and_sockets(
    v1_tree: TreeV1, scope: JobScope
) -> None:
    page = os.sysconf("SC_PAGESIZE")
    all_kinds = ("memory", "memory.memsw", "memory.kmem.tcp")
    there = partial(files.exists, v1_tree.by_controller["memory"])
    names = [name for kind in all_kinds if there(name := f"{kind}.limit_in_bytes")]
    for limit in (64 * MIB + 1, 16 * MIB, 32 * MIB):
        scope.arm(ScopeLimits(memory_bytes=limit))
        assert {int(kept(v1_tree, "memory", name)) for name in names} == {limit // page * page}
    scope.arm(ScopeLimits())
    assert min(int(kept(v1_tree, "memory", name)) for name in names) > 1 << 62


@MEMORY
def test_memory_limit_below_what_is_charged_is_refused_with_that(
    v1_tree: TreeV1, scope: JobScope
) -> None:
    with holding(scope), pytest.raises(SandboxError) as caught:
        scope.arm(ScopeLimits(memory_bytes=MIB))
    assert caught.value.message.startswith("cannot set job/memory.limit_in_bytes to 1048576: ")
    assert "bytes are charged to the scope already" in caught.value.message
    assert caught.value.remedy == "raise the job's memory limit"


@MEMORY
def test_memory_is_counted_and_its_peak_begins_anew(v1_tree: TreeV1, scope: JobScope) -> None:
    with holding(scope):
        usage = scope.usage()
        assert usage.memory_peak_bytes >= usage.memory_bytes >= 24 * MIB
    assert scope.usage().memory_peak_bytes >= 24 * MIB
    scope.arm(ScopeLimits())
    assert scope.usage().memory_peak_bytes < 24 * MIB


@MEMORY
def test_kernel_signals_want_of_memory_in_the_group_and_not_above(
    v1_tree: TreeV1, scope: JobScope
) -> None:
    scope.arm(ScopeLimits(memory_bytes=8 * MIB))
    pipe = subprocess.PIPE
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", HOLDS],
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
        check=False,
        preexec_fn=lambda: scope.attach_self(cloned=False),
    )
    assert done.returncode < 0
    while not scope.oom_kills():
        pass  # the kernel counts a moment later
    assert scope.oom_kills() == 1
    assert scope.is_over_limit()
    assert v1_tree.ooms_above() == 0


@MEMORY
def test_sockets_that_the_group_counts_are_read_since_the_last_time(
    v1_tree: TreeV1, scope: JobScope
) -> None:
    scope.arm(ScopeLimits())
    assert scope.sockets_counted() == (scope.sockets_limit_bytes,) * 2, "it has no limit"
    assert scope.sockets_beyond_limit() == 0
    scope.arm(ScopeLimits(memory_bytes=64 * MIB))
    if files.exists(v1_tree.by_controller["memory"], "job/memory.kmem.tcp.usage_in_bytes"):
        assert scope.sockets_counted() == (0, 0)
    else:
        assert scope.sockets_counted() == (64 * MIB, 64 * MIB), "all of it may be in sockets"
    assert scope.sockets_beyond_limit() == 0


def devices(tree: TreeV1) -> tuple[Device, ...]:
    found = tree.devices()
    if not found:
        pytest.skip("the host has no block device with a limit of its own")
    return found


@IO
def test_every_disk_has_the_same_limit_for_reads_and_for_writes(
    v1_tree: TreeV1, scope: JobScope
) -> None:
    numbers = {device.number for device in devices(v1_tree)}
    for bps in (MIB, 2 * MIB):
        scope.arm(ScopeLimits(io_bps=bps))
        for way in ("read", "write"):
            lines = files.table(kept(v1_tree, "io", f"blkio.throttle.{way}_bps_device"))
            assert lines == dict.fromkeys(numbers, bps)
    scope.arm(ScopeLimits())
    assert kept(v1_tree, "io", "blkio.throttle.read_bps_device") == ""


@IO
def test_kill_lifts_the_io_limit_since_delayed_io_cannot_be_killed(
    v1_tree: TreeV1, scope: JobScope
) -> None:
    devices(v1_tree)
    scope.arm(ScopeLimits(io_bps=MIB))
    scope.kill()
    assert kept(v1_tree, "io", "blkio.throttle.write_bps_device") == ""


@IO
def test_io_limit_on_a_host_without_disks_is_refused(
    v1_tree: TreeV1, scope: JobScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v1_tree, "devices", tuple)
    with pytest.raises(SandboxError, match="the host has no block device"):
        scope.arm(ScopeLimits(io_bps=MIB))
    scope.arm(ScopeLimits())


@IO
def test_what_v1_cannot_do_is_told(v1_tree: TreeV1) -> None:
    told = v1_tree.missing_features()
    assert "buffered writes are neither throttled nor counted on cgroup v1" in told
    assert any("cgroup.kill" in line for line in told) != v1_tree.kills_groups


@pytest.mark.parametrize(
    ("controller", "there", "has_swap", "reason"),
    [
        ("pids", [], False, "the kernel does not offer pids.max"),
        ("memory", ["memory.limit_in_bytes"], True, "the host has swap"),
    ],
)
def test_hierarchy_without_what_a_limit_needs_is_refused(
    tmp_path: Path, controller: str, there: list[str], has_swap: bool, reason: str
) -> None:
    top = os.open(tmp_path, files.DIRECTORY)
    for name in there:
        (tmp_path / name).touch()
    with pytest.raises(HostUnsupported, match=reason) as caught:
        v1._check(top, controller, has_swap)
    os.close(top)
    assert caught.value.remedy
    assert caught.value.data["controller"] == controller


@pytest.mark.parametrize("has_swap", [False, True])
def test_memory_is_limited_without_a_count_of_swap_if_there_is_no_swap(
    tmp_path: Path, has_swap: bool
) -> None:
    top = os.open(tmp_path, files.DIRECTORY)
    (tmp_path / "memory.limit_in_bytes").touch()
    if has_swap:
        (tmp_path / "memory.memsw.limit_in_bytes").touch()
    v1._check(top, "memory", has_swap)
    os.close(top)
