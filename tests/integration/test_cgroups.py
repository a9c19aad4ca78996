"""The control-group layer against the kernel of this host, whichever hierarchies it has."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobworker import errors
from jobworker.sandbox.cgroup import files as cgroup_files
from jobworker.sandbox.cgroup import hierarchy as cgroups
from jobworker.sandbox.cgroup import mounts as cgroup_mounts
from jobworker.sandbox.cgroup import v1 as cgroup_v1
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits, Tree
from tests.e2e import cgroup_probes as probes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making control groups needs root")
NAME = f"jobworker-test-{os.getpid()}"
LIVE_BOMB = """
import os
while True:
    try:
        if os.fork() == 0 and os.fork() == 0:
            os._exit(0)
    except BlockingIOError:
        pass
"""
_UNMOUNTED = """
import sys
sys.path.insert(0, sys.argv[1])
from jobworker import errors
from jobworker.sandbox.cgroup import hierarchy as cgroups
from jobworker.sandbox import syscalls
syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
syscalls.umount(sys.argv[2])
try:
    cgroups.open_tree(("cpu", "memory", "io", "pids"), sys.argv[3])
except errors.HostUnsupported as error:
    print(error.data["controller"], error)
"""


def hierarchies() -> cgroup_mounts.Hierarchies:
    """This host's."""
    names = ("self/mountinfo", "self/cgroup", "cgroups")
    mountinfo, membership, enabled = (Path("/proc", name).read_text() for name in names)
    return cgroup_mounts.parse(mountinfo, membership, enabled)


def needs_v1() -> cgroup_mounts.Hierarchies:
    """This host's hierarchies, or a skip where they do not hold the v1 controllers."""
    found = hierarchies()
    for name in ("cpu", "cpuacct", "memory", "blkio", "pids"):
        if found.legacy(name) is None:
            pytest.skip(f"the kernel has no cgroup v1 hierarchy mounted for {name}")
    return found


@pytest.fixture
def tree() -> Iterator[Tree]:
    """A tree on this host; nothing of it is left afterwards, directories or descriptors."""
    before = len(os.listdir("/proc/self/fd"))
    tree = cgroups.open_tree(probes.ALL, NAME)
    yield tree
    tree.close()
    tree.close()
    assert probes.leftovers(NAME) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def pure_v1() -> Iterator[Tree]:
    """A tree that uses the v1 hierarchies alone, as on a host without a cgroup2 mount."""
    found = needs_v1()
    mounts = tuple(mount for mount in found.mounts if mount.version == 1)
    before = len(os.listdir("/proc/self/fd"))
    tree = cgroup_v1.open_v1(found._replace(mounts=mounts), probes.ALL, NAME, "", has_swap=False)
    yield tree
    tree.close()
    assert probes.leftovers(NAME) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on a disk: /tmp is often memory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


SPINNERS = pytest.param(probes.two_spinners_get_half_a_core, marks=pytest.mark.alone)
"""It needs half a core of this host to be had."""


@pytest.mark.parametrize(
    "probe",
    [
        SPINNERS if probe is probes.two_spinners_get_half_a_core else probe
        for probe in probes.PROBES
    ],
)
def test_limits_hold(probe: Callable[[Tree, Path], str], tree: Tree, disk: Path) -> None:
    probe(tree, disk)


@pytest.mark.parametrize(
    "probe",
    [
        probes.memory_hog_is_killed,
        SPINNERS,
        probes.fork_bomb_stops_at_its_limit,
        probes.kill_reaches_daemons,
        probes.counting_starts_at_arm,
    ],
)
def test_limits_hold_without_cgroup2(
    probe: Callable[[Tree, Path], str], pure_v1: Tree, disk: Path
) -> None:
    assert pure_v1.kind == "v1"
    assert pure_v1.unified is None
    probe(pure_v1, disk)


def test_missing_controller_is_named_with_reason_and_remedy() -> None:
    mount = needs_v1().legacy("blkio")
    assert mount is not None
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _UNMOUNTED, probes.SOURCE, mount.point, NAME],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("io cannot use the io controller: its hierarchy is not mounted")
    assert "mount -t cgroup -o blkio" in done.stdout
    assert probes.leftovers(NAME) == []


def test_failed_open_leaves_nothing() -> None:
    needs_v1()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.HostUnsupported, match=r"cannot make the group .*/absent") as caught:
        cgroups.open_tree(probes.ALL, NAME, parent="absent")
    assert "parent group that exists" in caught.value.remedy
    assert probes.leftovers(NAME) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_kernel_refusal_names_file_value_and_reason(tree: Tree) -> None:
    if tree.kind == "v2":
        pytest.skip("cgroup v2 takes a quota above the parent's")
    top = tree.by_controller["cpu"]
    cgroup_files.write(top, "cpu.cfs_quota_us", "50000")
    scope = tree.create("refused")
    with pytest.raises(errors.SandboxError) as caught:
        scope.arm(ScopeLimits(cpu_percent=200))
    scope.remove()
    expected = "cannot set refused/cpu.cfs_quota_us to 200000: Invalid argument"
    assert str(caught.value).startswith(expected)
    assert caught.value.data == {"step": "limits"}


def test_limit_without_its_controller_is_refused() -> None:
    tree = cgroups.open_tree(("pids",), NAME)
    scope = tree.create("job")
    with pytest.raises(errors.SandboxError, match=r"cannot limit memory: .* not in use"):
        scope.arm(ScopeLimits(memory_bytes=64 << 20))
    scope.arm(ScopeLimits(pids=5))
    assert scope.usage().memory_bytes == 0
    scope.remove()
    tree.close()
    assert probes.leftovers(NAME) == []


def test_second_scope_of_a_name_is_refused_and_the_first_stays(tree: Tree) -> None:
    scope = tree.create("job")
    with pytest.raises(errors.SandboxError, match=r"cannot make scope job: .*File exists"):
        tree.create("job")
    scope.arm(ScopeLimits(pids=5))
    scope.remove()


def test_create_that_fails_midway_leaves_no_directory(tree: Tree) -> None:
    os.mkdir("job", dir_fd=tree.tops[-1])
    with pytest.raises(errors.SandboxError):
        tree.create("job")
    holders = [top for top in tree.tops if cgroup_files.exists(top, "job")]
    os.rmdir("job", dir_fd=tree.tops[-1])
    assert holders == [tree.tops[-1]]


def test_open_that_fails_midway_leaves_no_directory() -> None:
    mount = needs_v1().legacy("cpu")
    assert mount is not None
    parent = Path(mount.point, f"{NAME}-parent")  # in the first hierarchy and in no other
    parent.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(errors.HostUnsupported, match="memory controller"):
            cgroups.open_tree(("cpu", "memory"), NAME, parent=parent.name)
        assert probes.leftovers(NAME) == []
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        parent.rmdir()


def test_killing_one_by_one_ends_a_bomb_that_goes_on_forking(pure_v1: Tree) -> None:
    scope = pure_v1.create("bomb")
    scope.arm(ScopeLimits(pids=100))
    with probes.ended(probes.start(scope, *probes.python(LIVE_BOMB))) as child:
        while scope.usage().pids < 50:
            pass
        scope.kill()
        assert child.wait(20) == -9
        probes.wait_empty(pure_v1, scope)
        assert not any(cgroup_files.members(top, "bomb") for top in pure_v1.tops)
    top = pure_v1.by_controller["pids"]
    assert cgroup_files.read(top, "bomb/pids.max").strip() == "0"
    scope.remove()


def test_tree_with_a_scope_cannot_be_closed(tree: Tree) -> None:
    scope = tree.create("job")
    with pytest.raises(OSError, match=r"\.\./" + NAME):
        tree.close()
    scope.remove()


def test_directory_stands_in_the_groups_of_this_process() -> None:
    found = needs_v1()
    tree = cgroups.open_tree(("memory", "pids"), NAME)
    paths = probes.leftovers(NAME)
    tree.close()
    for name in ("memory", "pids"):
        mount = found.legacy(name)
        assert mount is not None
        assert f"{found.own_path(mount, name)}/{NAME}" in paths


def test_groups_in_hierarchies_that_are_not_used_any_more_are_swept() -> None:
    before = len(os.listdir("/proc/self/fd"))
    earlier = cgroups.open_tree(probes.ALL, NAME)
    process = subprocess.Popen(["/bin/sleep", "600"])
    for top in earlier.tops:
        os.mkdir("left", dir_fd=top)
        cgroup_files.write(top, "left/cgroup.procs", str(process.pid))
    now = cgroups.open_tree((), NAME)
    now.sweep()
    cgroups.sweep_elsewhere(now)
    assert process.wait(10) == -signal.SIGKILL
    assert len(probes.leftovers(NAME)) == len(now.tops)
    cgroups.sweep_elsewhere(now)
    now.close()
    earlier.close()
    assert probes.leftovers(NAME) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_sweep_ends_groups_that_a_job_made_below_its_own(tree: Tree) -> None:
    for top in tree.tops:
        os.makedirs(f"/proc/self/fd/{top}/left/nested/deeper")
    assert tree.sweep() == ["left"]
    assert tree.sweep() == []


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_names_cannot_leave_the_directory(tree: Tree, name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        tree.create(name)
    with pytest.raises(ValueError, match="not a name"):
        cgroups.open_tree(("pids",), name)
