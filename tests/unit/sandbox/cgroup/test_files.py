"""Parsing control files and block devices, on ordinary files."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker import errors
from jobworker.sandbox.cgroup import block_devices
from jobworker.sandbox.cgroup import files as cgroup_files
from jobworker.sandbox.cgroup import v1 as cgroup_v1
from jobworker.sandbox.cgroup import v2 as cgroup_v2


@pytest.fixture
def top(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, cgroup_files.DIRECTORY)
    yield descriptor
    os.close(descriptor)


def test_table_takes_keyed_numbers_and_skips_the_rest() -> None:
    text = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\nlow max\nhead\n"
    assert cgroup_files.table(text) == {"oom_kill_disable": 0, "under_oom": 0, "oom_kill": 3}


def test_v1_io_counts_reads_and_writes_of_devices_that_stand_on_no_other() -> None:
    text = "254:0 Read 10\n254:0 Write 20\n254:0 Total 30\n253:0 Read 10\n8:0 Read 5\nTotal 45\n"
    assert cgroup_v1.sum_io(text, frozenset({"253:0"})) == (15, 20)
    assert cgroup_v1.sum_io("", frozenset()) == (0, 0)


def test_v2_io_counts_reads_and_writes_of_devices_that_stand_on_no_other() -> None:
    text = "254:0 rbytes=10 wbytes=20 rios=1 wios=2\n253:0 rbytes=10 wbytes=20\n8:0 \n"
    assert cgroup_v2.sum_io(text, frozenset({"253:0"})) == (10, 20)


def test_nested_keyed_file_is_read_by_device_and_name() -> None:
    text = "254:0 rbps=1024 wbps=max riops=max wiops=max\n"
    assert cgroup_v2.keyed(text)["254:0"]["rbps"] == "1024"
    assert cgroup_v2.keyed(text)["254:0"]["wbps"] == "max"


def test_limit_that_the_kernel_silently_changed_is_refused(tmp_path: Path, top: int) -> None:
    Path(tmp_path, "pids.max").write_text("")
    with pytest.raises(errors.SandboxError, match=r"pids\.max to 7: the kernel kept '7'"):
        cgroup_files.set_limit(top, "pids.max", "7", "8".__eq__)


def test_missing_control_file_is_refused_with_its_name(top: int) -> None:
    with pytest.raises(errors.SandboxError, match=r"cannot set pids\.max to 7: No such file"):
        cgroup_files.set_limit(top, "pids.max", "7", "7".__eq__)


def test_groups_are_listed_deepest_first(tmp_path: Path, top: int) -> None:
    Path(tmp_path, "a/b/c").mkdir(parents=True)
    Path(tmp_path, "a/cgroup.procs").write_text("0\n7\n")
    Path(tmp_path, "a/b/c/cgroup.procs").write_text("8\n")
    assert cgroup_files.groups_below(top, "a") == ["a/b/c", "a/b", "a"]
    assert cgroup_files.groups_below(top, "absent") == []
    assert cgroup_files.members(top, "a") == {7, 8}


def device(root: Path, name: str, number: str, sectors: int, slave: str = "") -> None:
    directory = root / name
    (directory / "slaves" / slave).mkdir(parents=True)
    (directory / "size").write_text(f"{sectors}\n")
    if number:
        (directory / "dev").write_text(f"{number}\n")


def test_whole_disks_with_a_size_are_limited(tmp_path: Path, top: int) -> None:
    device(tmp_path, "vda", "254:0", 100)
    device(tmp_path, "dm-0", "253:0", 100, slave="vda")
    device(tmp_path, "loop0", "7:0", 100)
    device(tmp_path, "sr0", "11:0", 0)
    device(tmp_path, "ram0", "1:0", 100)
    device(tmp_path, "nvme0c0n1", "", 100)
    assert set(block_devices.scan(top)) == {
        ("254:0", False),
        ("253:0", True),
    }


def test_disk_that_was_plugged_in_later_is_seen(tmp_path: Path, top: int) -> None:
    assert block_devices.scan(top) == ()
    device(tmp_path, "sdb", "8:16", 100)
    assert [found.number for found in block_devices.scan(top)] == ["8:16"]
