"""Reading /proc's account of the control groups: hosts of every shape, as text."""

import pytest

from jobworker.sandbox.cgroup import mounts as cgroup_mounts
from jobworker.sandbox.cgroup.mounts import Hierarchies, below_mount, first_missing, missing, parse

V2 = "30 24 0:25 / /sys/fs/cgroup rw,nosuid shared:8 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "33 25 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "34 25 0:29 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory\n"
    "35 25 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
)
HYBRID = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
OTHER = "27 1 254:0 / / rw - ext4 /dev/vda rw\n22 27 0:21 / /proc rw - proc proc rw\n"
MEMBERSHIP = "5:cpu,cpuacct:/a\n4:memory:/b/c\n1:name=systemd:/s\n0::/u\n"
ENABLED = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t5\t1\t1\nmemory\t4\t1\t1\n"


def host(mountinfo: str, enabled: str = ENABLED) -> Hierarchies:
    return parse(OTHER + mountinfo, MEMBERSHIP, enabled)


def test_other_file_systems_are_no_hierarchies() -> None:
    assert parse(OTHER, "", "").mounts == ()


def test_v2_host_has_one_hierarchy() -> None:
    found = host(V2)
    mount = found.unified()
    assert mount is not None
    assert (mount.point, mount.version, mount.controllers) == ("/sys/fs/cgroup", 2, frozenset())
    assert found.legacy("memory") is None
    assert found.own_path(mount) == "/sys/fs/cgroup/u"


def test_controllers_that_share_a_hierarchy_are_both_found_there() -> None:
    found = host(HYBRID)
    assert found.legacy("cpu") == found.legacy("cpuacct")
    mount = found.legacy("cpuacct")
    assert mount is not None
    assert found.own_path(mount, "cpuacct") == "/sys/fs/cgroup/cpu,cpuacct/a"
    unified = found.unified()
    assert unified is not None
    assert unified.point == "/sys/fs/cgroup/unified"


def test_mount_flags_are_no_controllers() -> None:
    assert host(V1).legacy("rw") is None
    assert host(V1).legacy("xattr") is None


def test_escaped_blanks_in_a_mount_point() -> None:
    line = r"9 8 0:1 / /a\040b\134c rw - cgroup2 none rw"
    assert cgroup_mounts.parse_mounts(line)[0].point == r"/a b\c"


@pytest.mark.parametrize(
    ("root", "path", "below"),
    [
        ("/", "/", ""),
        ("/", "/a/b", "/a/b"),
        ("/docker/1", "/docker/1", ""),
        ("/docker/1", "/docker/1/x", "/x"),
        ("/docker/1", "/docker/12", ""),
        ("/docker/1", "/elsewhere", ""),
        ("/", "/../other", ""),
    ],
)
def test_group_is_found_below_what_the_mount_shows(root: str, path: str, below: str) -> None:
    assert below_mount(root, path) == below


def test_parent_takes_the_place_of_our_own_group() -> None:
    found = host(HYBRID)
    mount = found.legacy("memory")
    assert mount is not None
    assert cgroup_mounts.base_path(found, mount, "memory", "") == "/sys/fs/cgroup/memory/b/c"
    assert cgroup_mounts.base_path(found, mount, "memory", "/x/") == "/sys/fs/cgroup/memory/x"


@pytest.mark.parametrize(
    ("mountinfo", "offered", "controllers", "absent"),
    [
        (V2, ["memory", "pids"], ["memory", "io"], "io"),
        (V1, [], ["cpu", "memory"], None),
        (V1, [], ["cpu", "io", "pids"], "io"),
        (HYBRID, ["io"], ["memory", "io"], "io"),
        (HYBRID, ["io"], ["io", "pids"], "pids"),
    ],
)
def test_controller_that_is_nowhere_is_blamed_first(
    mountinfo: str, offered: list[str], controllers: list[str], absent: str | None
) -> None:
    assert first_missing(controllers, host(mountinfo), offered) == absent


OFF = ENABLED.replace("memory\t4\t1\t1", "memory\t0\t1\t0")
COMPILED = ENABLED + "pids\t0\t1\t1\n"


@pytest.mark.parametrize(
    ("controller", "mountinfo", "enabled", "offered", "reason", "remedy"),
    [
        ("cpu", "", ENABLED, [], "no control-group file system", "mount -t cgroup2"),
        ("memory", V2, OFF, ["cpu"], "switched off", "cgroup_disable=memory"),
        ("pids", V1, COMPILED, [], "not mounted", "mount -t cgroup -o pids"),
        ("io", V2, ENABLED, ["cpu"], "cgroup.controllers does not list", "CONFIG_BLK_CGROUP"),
        ("io", HYBRID, ENABLED, ["io"], "on cgroup v2 while other", "unified_cgroup_hierarchy"),
        ("memory", HYBRID, ENABLED, ["io"], "on cgroup v1 while other", "unified_cgroup_hierarchy"),
    ],
)
def test_missing_controller_has_its_own_reason_and_remedy(
    controller: str, mountinfo: str, enabled: str, offered: list[str], reason: str, remedy: str
) -> None:
    error = missing(controller, host(mountinfo, enabled), offered)
    assert error.message.startswith(f"cannot use the {controller} controller: ")
    assert reason in error.message
    assert remedy in error.remedy
    assert error.data == {"controller": controller}
