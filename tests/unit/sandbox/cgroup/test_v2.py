"""What scopes write to v2 files, and what they read there: on ordinary files of the same names."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.errors import HostUnsupported, SandboxError
from jobworker.sandbox.cgroup import files, v2
from jobworker.sandbox.cgroup.accounting import ScopeLimits
from jobworker.sandbox.cgroup.block_devices import Device
from jobworker.sandbox.cgroup.delegation import Base
from jobworker.sandbox.cgroup.scope import JobScope
from jobworker.sandbox.cgroup.v2 import TreeV2

from ....descriptors import descriptors

ALL = ("cpu", "memory", "io", "pids")
COUNTS = {
    "cpu.stat": "usage_usec 5\nuser_usec 4\nthrottled_usec 2\n",
    "memory.current": "4096\n",
    "memory.events": "low 0\noom 3\noom_kill 4\noom_group_kill 2\n",
    "memory.peak": "8192\n",
    "io.stat": "254:0 rbytes=10 wbytes=20\n7:0 rbytes=100 wbytes=200\n",
    "pids.current": "3\n",
}
LIMITS = ("cpu.max", "memory.max", "io.max", "pids.max", "memory.oom.group", "memory.swap.max")


class Group:
    """A directory with the files of a group, for a tree and one scope in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.restored = path, 0
        (path / "job").mkdir()
        for name in ("memory.peak", "memory.oom.group", "memory.swap.max"):
            (path / name).touch()
        for name, text in {**dict.fromkeys(LIMITS, ""), **COUNTS}.items():
            (path / "job" / name).write_text(text)
        self._top = os.open(path, files.DIRECTORY)

    def tree(self, *controllers: str) -> TreeV2:
        """The tree, as the kernel has its files now."""
        base = cast("Base", SimpleNamespace(restore=self._restore))
        made = TreeV2("mine", controllers or ALL, os.dup(self._top), base)
        made.devices = lambda: (Device("254:0", stacked=False),)  # type: ignore[method-assign]
        return made

    def scope(self, *controllers: str) -> JobScope:
        return self.tree(*controllers).adopt("job")

    def _restore(self) -> None:
        self.restored += 1

    def lacks(self, name: str) -> None:
        """Have the kernel be without a file."""
        (self.path / name).unlink()

    def __getitem__(self, name: str) -> str:
        return (self.path / "job" / name).read_text()

    def __setitem__(self, name: str, text: str) -> None:
        (self.path / "job" / name).write_text(text)

    def close(self) -> None:
        os.close(self._top)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    made = Group(tmp_path)
    yield made
    made.close()


class Kernel:
    """What was written to control files, in this order. Files keep it as the kernel does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines = list[str]()
        self.devices = dict[str, str]()
        monkeypatch.setattr(files, "write", self._write)

    def _write(self, top: int, path: str, value: str) -> None:
        self.lines.append(f"{path.removeprefix('job/')} {value}")
        if path.endswith("memory.max") and value != "max":
            page = os.sysconf("SC_PAGESIZE")
            value = str(int(value) // page * page)
        if path.endswith("io.max"):
            number, _, limits = value.partition(" ")
            self.devices[number] = limits
            if limits == "rbps=max wbps=max":
                del self.devices[number]
            value = "".join(f"{n} {bps}\n" for n, bps in self.devices.items())
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC, dir_fd=top)
        os.write(descriptor, value.encode())
        os.close(descriptor)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


# --- limits -------------------------------------------------------------------------------------


def test_limits_are_written_as_the_kernel_reads_them(group: Group, kernel: Kernel) -> None:
    limits = ScopeLimits(cpu_percent=150, memory_bytes=(64 << 20) + 1, io_bps=1024, pids=7)
    group.scope().arm(limits)
    assert kernel.lines == [
        "cpu.max 150000 100000",
        "memory.oom.group 1",
        "memory.swap.max 0",
        "memory.max 67108865",
        "io.max 254:0 rbps=1024 wbps=1024",
        "pids.max 7",
    ]


def test_no_limit_is_max(group: Group, kernel: Kernel) -> None:
    group.scope().arm(ScopeLimits())
    assert kernel.lines == [
        "cpu.max max 100000",
        "memory.oom.group 1",
        "memory.swap.max max",
        "memory.max max",
        "pids.max max",
    ]


def test_io_limits_of_the_job_before_are_lifted_first(group: Group, kernel: Kernel) -> None:
    scope = group.scope("io")
    scope.arm(ScopeLimits(io_bps=1024))
    kernel.lines.clear()
    scope.arm(ScopeLimits(io_bps=2048))
    assert kernel.lines == [
        "io.max 254:0 rbps=max wbps=max",
        "io.max 254:0 rbps=2048 wbps=2048",
    ]


def test_controllers_that_are_not_in_use_are_left_alone(group: Group, kernel: Kernel) -> None:
    scope = group.scope("pids")
    scope.arm(ScopeLimits(pids=7))
    assert kernel.lines == ["pids.max 7"]
    assert scope.usage().pids == 3
    assert scope.oom_kills() == 0
    assert not scope.is_over_limit()


def test_features_that_this_kernel_lacks_are_left_alone_and_told(
    group: Group, kernel: Kernel
) -> None:
    for name in ("memory.oom.group", "memory.swap.max", "memory.peak"):
        group.lacks(name)
    tree = group.tree()
    tree.adopt("job").arm(ScopeLimits())
    assert not {line.split()[0] for line in kernel.lines} & {"memory.oom.group", "memory.swap.max"}
    told = "\n".join(tree.missing_features())
    for name in ("memory.peak", "memory.oom.group", "cgroup.kill"):
        assert name in told


def test_memory_limit_below_what_is_charged_is_refused(group: Group, kernel: Kernel) -> None:
    """The kernel would take it, and kill the group."""
    group["memory.current"] = "8193\n"
    with pytest.raises(SandboxError, match="to 8192: 8193 bytes are charged to the scope already"):
        group.scope("memory").arm(ScopeLimits(memory_bytes=8192))
    assert not kernel.lines
    group.scope("memory").arm(ScopeLimits())


def test_io_limit_on_a_host_without_disks_is_refused(group: Group, kernel: Kernel) -> None:
    tree = group.tree("io")
    tree.devices = tuple  # type: ignore[method-assign]
    with pytest.raises(SandboxError, match=r"io\.max to 1024: the host has no block device"):
        tree.adopt("job").arm(ScopeLimits(io_bps=1024))


@pytest.mark.parametrize("kept", ["254:0 rbps=1024 wbps=max\n", "8:0 rbps=1024 wbps=1024\n", ""])
def test_io_limit_that_the_kernel_did_not_keep_is_refused(
    group: Group, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "write", lambda *_: None)
    reads = iter(["", kept])
    monkeypatch.setattr(files, "read", lambda *_: next(reads))
    limit = group.tree("io").adopt("job")._limit_io  # type: ignore[attr-defined]
    with pytest.raises(SandboxError, match="the kernel kept"):
        limit(1024, (Device("254:0", stacked=False),))


# --- counts -------------------------------------------------------------------------------------


def test_counters_are_read_in_the_units_of_the_service(group: Group) -> None:
    assert group.scope().usage() == (5000, 4096, 8192, 10, 20, 3, 2000, 2)


def test_peak_begins_anew_if_the_kernel_can_reset_it(group: Group) -> None:
    """By a write to a descriptor that stays open: Linux 6.12."""
    before = len(descriptors())
    scope = group.scope("memory")
    scope._restart_peak()
    assert group["memory.peak"] == "0192\n"
    group["memory.peak"] = "77\n"
    group.lacks("job/memory.peak")
    assert scope.usage().memory_peak_bytes == 77, "other descriptors still show the old one"
    scope._restart_peak()
    scope.close()
    assert len(descriptors()) == before + 1, "the tree's directory"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EINVAL])
def test_peak_counts_from_the_creation_if_the_kernel_cannot_reset_it(
    group: Group, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    scope = group.scope("memory")
    before = len(descriptors())
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        scope._restart_peak()
    assert len(descriptors()) == before
    assert scope.usage().memory_peak_bytes == 8192


def test_peak_is_the_largest_sample_if_the_kernel_keeps_none(group: Group) -> None:
    group.lacks("memory.peak")
    scope = group.scope("memory")
    for now, peak in (("5\n", 5), ("9\n", 9), ("7\n", 9)):
        group["memory.current"] = now
        assert scope.usage().memory_peak_bytes == peak
    scope._restart_peak()
    assert scope.usage().memory_peak_bytes == 7


def test_kills_are_those_of_whole_groups_if_the_kernel_counts_them(group: Group) -> None:
    scope = group.scope("memory")
    assert scope.oom_kills() == 2
    group["memory.events"] = "oom 3\noom_kill 4\n"
    assert scope.oom_kills() == 4
    assert scope._own_oom_count() == 3


# --- the host -----------------------------------------------------------------------------------


def test_tree_that_is_closed_restores_the_group_that_it_stood_in(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine").mkdir()
    group = Group(tmp_path / "mine")
    for path in [*(tmp_path / "mine/job").iterdir(), *(tmp_path / "mine").glob("memory*")]:
        path.unlink()
    (tmp_path / "mine/job").rmdir()
    before = len(descriptors())
    group.tree().close()
    group.close()
    assert group.restored == 1
    assert len(descriptors()) == before - 1


@pytest.mark.parametrize(
    ("lacks", "has_swap", "reason"),
    [
        ("io.max", False, "the kernel does not offer io.max"),
        ("memory.swap.max", True, "the host has swap, which this kernel does not count"),
    ],
)
def test_host_without_what_a_limit_needs_is_refused(
    group: Group, lacks: str, has_swap: bool, reason: str
) -> None:
    (group.path / "job" / lacks).unlink()
    top = os.open(group.path / "job", files.DIRECTORY)
    with pytest.raises(HostUnsupported, match=reason) as caught:
        v2._check(top, ALL, has_swap)
    os.close(top)
    assert caught.value.remedy


def test_memory_is_limited_without_a_count_of_swap_if_there_is_no_swap(group: Group) -> None:
    (group.path / "job/memory.swap.max").unlink()
    top = os.open(group.path / "job", files.DIRECTORY)
    v2._check(top, ALL, has_swap=False)
    os.close(top)
