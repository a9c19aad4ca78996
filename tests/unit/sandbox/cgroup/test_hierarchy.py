"""Which tree a host gets, and where an earlier instance may have left one."""

import pytest

from jobworker.errors import HostUnsupported
from jobworker.sandbox.cgroup import hierarchy, mounts
from jobworker.sandbox.cgroup.hierarchy import most_processes, open_tree
from jobworker.sandbox.cgroup.none import NoTree

NOTHING_MOUNTED = {
    "self/mountinfo": "",
    "self/cgroup": "0::/\n",
    "cgroups": "",
    "swaps": "",
}
HYBRID = """\
30 25 0:26 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct
31 25 0:27 / /cg/devices rw - cgroup cgroup rw,devices
32 25 0:28 / /cg/unified rw - cgroup2 cgroup2 rw
"""


def play(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Have /proc show these files and no others."""
    monkeypatch.setattr(hierarchy, "_proc", lambda name, **_: files[name])


@pytest.mark.parametrize(
    ("pid_max", "threads", "most"), [(32_768, 100_000, 9557), (4_194_304, 8000, 7000)]
)
def test_a_part_of_the_hosts_processes_is_left_to_the_host(
    monkeypatch: pytest.MonkeyPatch, pid_max: int, threads: int, most: int
) -> None:
    play(
        monkeypatch,
        {"sys/kernel/pid_max": f"{pid_max}\n", "sys/kernel/threads-max": f"{threads}\n"},
    )
    assert most_processes() == most


def test_this_host_has_processes_for_jobs() -> None:
    assert most_processes() > 0


def test_host_that_is_not_supported_is_enough_if_nothing_is_to_be_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> mounts.Hierarchies:
        raise HostUnsupported("cannot make a group")

    monkeypatch.setattr(hierarchy, "_hierarchies", refuse)
    tree = open_tree((), "jobworker-x")
    assert isinstance(tree, NoTree)
    assert tree.missing_features()[0].endswith(": cannot make a group")
    tree.close()
    with pytest.raises(HostUnsupported):
        open_tree(("pids",), "jobworker-x")


@pytest.mark.parametrize("controller", ["cpu", "memory", "io", "pids"])
def test_host_without_control_groups_is_refused_by_the_name_of_the_controller(
    monkeypatch: pytest.MonkeyPatch, controller: str
) -> None:
    play(monkeypatch, NOTHING_MOUNTED)
    with pytest.raises(HostUnsupported) as caught:
        open_tree((controller,), "jobworker-x")
    assert caught.value.data["controller"] == controller
    assert caught.value.remedy


@pytest.mark.parametrize("parent", ["..", "a/../b"])
def test_parent_cannot_leave_the_mount(parent: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        open_tree((), "jobworker-x", parent=parent)


def test_unknown_controller_is_a_fault_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"no such controllers: \['disk'\]"):
        open_tree(("cpu", "disk"), "jobworker-x")


def test_earlier_instance_is_looked_for_where_this_one_would_stand() -> None:
    found = mounts.parse(HYBRID, "1:cpu,cpuacct:/own\n2:devices:/own\n0::/session\n", "")
    assert set(hierarchy._places(found, "mine", "")) == {
        "/cg/cpu/own/mine",
        "/cg/unified/session/mine",
        "/cg/unified/mine",
    }
    assert "/cg/cpu/jobs/mine" in set(hierarchy._places(found, "mine", "jobs"))


def test_kernel_that_shows_no_mounts_is_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(HostUnsupported, match="cannot read /proc/absent: No such file") as caught:
        hierarchy._proc("absent")
    assert caught.value.remedy == "mount proc on /proc"
    assert hierarchy._proc("absent", missing_is_empty=True) == ""
