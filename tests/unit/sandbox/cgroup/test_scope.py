"""What scopes of every version have in common: arming, counting, killing, removing, sweeping."""

import errno
import os
import signal
import subprocess

import pytest

from jobworker.errors import SandboxError
from jobworker.sandbox.cgroup import files
from jobworker.sandbox.cgroup.accounting import ScopeLimits, ScopeUsage
from jobworker.sandbox.cgroup.hierarchy import Tree
from jobworker.sandbox.cgroup.none import NoScope, NoTree
from jobworker.sandbox.cgroup.scope import JobScope

from ....descriptors import descriptors
from .conftest import Start, enter, holders


class Played(NoScope):
    """A scope whose counters the test sets, and the limits that were written."""

    def __init__(self, tree: Tree) -> None:
        super().__init__(tree, "job")
        self.now, self.ooms, self.own_ooms = ScopeUsage(), 0, 0
        self.written: list[ScopeLimits] = []
        self.refuses: Exception | None = None

    def _write_limits(self, limits: ScopeLimits) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.written.append(limits)

    def _counters(self) -> ScopeUsage:
        return self.now

    def _oom_count(self) -> int:
        return self.ooms

    def _own_oom_count(self) -> int:
        return self.own_ooms


@pytest.fixture
def played() -> Played:
    tree = NoTree("none", "")
    tree.by_controller.update(dict.fromkeys(("cpu", "memory", "pids"), -1))
    return Played(tree)


# --- limits and counts --------------------------------------------------------------------------


def test_usage_is_what_was_counted_since_the_limits_were_set(played: Played) -> None:
    played.now = ScopeUsage(10, 20, 30, 40, 50, 6, 70, 8)
    played.arm(ScopeLimits())
    played.now = ScopeUsage(11, 21, 31, 42, 53, 7, 74, 9)
    assert played.usage() == ScopeUsage(1, 21, 31, 2, 3, 7, 4, 1), "memory and pids are those now"
    played.now = ScopeUsage()
    assert min(played.usage()) == 0


def test_kills_are_counted_since_the_limits_were_set(played: Played) -> None:
    played.ooms, played.now = 2, ScopeUsage(oom_kills=2)
    played.arm(ScopeLimits(memory_bytes=1))
    assert played.oom_kills() == 0
    played.ooms = 3
    assert played.oom_kills() == 1


def test_kill_is_for_the_limit_if_the_groups_own_count_grew(played: Played) -> None:
    played.own_ooms = 5
    played.arm(ScopeLimits(memory_bytes=1))
    assert not played.is_over_limit()
    played.own_ooms = 6
    assert played.is_over_limit()
    played.arm(ScopeLimits())
    played.own_ooms = 7
    assert not played.is_over_limit(), "it has no limit"


def test_limits_that_were_set_in_advance_are_not_set_again(played: Played) -> None:
    guessed = ScopeLimits(pids=5)
    played.now = ScopeUsage(cpu_ns=7)
    played.arm_ahead(guessed)
    played.now = ScopeUsage(cpu_ns=9)
    played.arm(guessed)
    assert played.written == [guessed]
    assert played.usage().cpu_ns == 2
    played.arm(guessed)
    assert played.written == [guessed, guessed], "only the first time is in advance"


def test_limits_that_were_guessed_wrong_are_set(played: Played) -> None:
    played.arm_ahead(ScopeLimits(pids=5))
    played.arm(ScopeLimits(pids=6))
    assert played.written == [ScopeLimits(pids=5), ScopeLimits(pids=6)]


def test_limits_that_cannot_be_set_in_advance_are_refused_when_they_are_asked_for(
    played: Played,
) -> None:
    played.refuses = PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    played.arm_ahead(ScopeLimits(pids=5))
    with pytest.raises(SandboxError, match=r"cannot set the limits of scope job: .*not permitted"):
        played.arm(ScopeLimits(pids=5))
    played.refuses = None
    played.arm(ScopeLimits(pids=5))
    assert played.written == [ScopeLimits(pids=5)]


@pytest.mark.parametrize(
    ("limits", "controller", "remedy"),
    [
        (ScopeLimits(io_bps=1), "io", "add io to cgroup.enable_controllers"),
        (ScopeLimits(cores="0"), "cpuset", "mount or delegate the cpuset controller"),
    ],
)
def test_limit_whose_controller_is_not_in_use_is_refused_by_name(
    played: Played, limits: ScopeLimits, controller: str, remedy: str
) -> None:
    with pytest.raises(SandboxError, match=f"cannot limit {controller}: ") as caught:
        played.arm(limits)
    assert caught.value.remedy.startswith(remedy)
    assert caught.value.data == {"step": "limits"}
    assert not played.written


def test_what_a_group_may_count_in_sockets_is_its_memory_limit(played: Played) -> None:
    played.arm(ScopeLimits(memory_bytes=1 << 20))
    assert played.sockets_limit_bytes == 1 << 20
    assert played.sockets_counted() == (1 << 20, 1 << 20)
    assert played.sockets_beyond_limit() == 0
    played.arm(ScopeLimits())
    assert played.sockets_limit_bytes > 1 << 60


def test_events_of_want_are_read_until_there_is_none(played: Played) -> None:
    played.clear_oom()
    played.oom_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    for number in (2, 1):
        os.eventfd_write(played.oom_fd, number)
        played.clear_oom()
        played.clear_oom()
    assert played._oom_events == 3
    played.close()


def test_cores_are_those_of_the_trees_directory(tree: Tree) -> None:
    if "cpuset" not in tree.by_controller:
        pytest.skip("the kernel has no cpuset controller here")
    assert tree.cores()
    scope = tree.create("job")
    scope.arm(ScopeLimits(cores="0"))
    top = tree.by_controller["cpuset"]
    assert files.read(top, "job/cpuset.cpus").strip() == "0"
    scope.arm(ScopeLimits())
    assert files.read(top, "job/cpuset.cpus").strip() == tree.cores()
    scope.close()


# --- life of a scope ----------------------------------------------------------------------------


def test_scope_stands_in_every_hierarchy_until_it_is_removed(tree: Tree) -> None:
    before = len(descriptors())
    scope = tree.create("job")
    assert holders(tree, "job") == len(tree.tops)
    scope.remove()
    scope.remove()
    assert holders(tree, "job") == 0
    assert len(descriptors()) == before


def test_scope_with_a_process_is_not_removed(tree: Tree, process: subprocess.Popen[bytes]) -> None:
    scope = tree.create("job")
    enter(tree, "job", process)
    with pytest.raises(OSError, match="busy"):
        scope.remove()
    assert scope.usage().pids == 1
    scope.close()


@pytest.mark.parametrize("kills_groups", [True, False])
def test_kill_ends_all_in_the_scope_and_nothing_beside_it(
    tree: Tree, start: Start, kills_groups: bool
) -> None:
    if kills_groups and not tree.kills_groups:
        pytest.skip("the kernel has no cgroup.kill: that needs cgroup2 and Linux 5.14")
    tree.kills_groups = kills_groups
    scope, other = tree.create("job"), tree.create("other")
    inside, beside = start(), start()
    enter(tree, "job", inside)
    enter(tree, "other", beside)
    scope.kill()
    assert inside.wait() == -signal.SIGKILL
    assert beside.poll() is None
    limit = files.read(tree.by_controller["pids"], "job/pids.max").strip()
    assert limit == ("max" if kills_groups else "0"), "else processes could be made meanwhile"
    scope.close()
    other.close()


def test_scope_that_is_closed_is_neither_killed_nor_removed(tree: Tree) -> None:
    """Another process may have removed it: then nothing of its name may be looked for."""
    scope = tree.create("job")
    scope.close()
    scope.remove()
    assert holders(tree, "job") == len(tree.tops)
    for top in tree.tops:
        os.rmdir("job", dir_fd=top)
    scope.kill()


def adopted(tree: Tree, name: str) -> JobScope:
    return tree.adopt(name, tree.open_directories(name))


def test_adopted_scope_is_used_by_its_own_directories(
    tree: Tree, process: subprocess.Popen[bytes]
) -> None:
    """Not by its name: the lookup would wait while another process makes or removes a group."""
    tree.create("job").close()
    enter(tree, "job", process)
    scope = adopted(tree, "job")
    scope.name = "absent"
    scope.arm(ScopeLimits(pids=5))
    assert files.read(tree.by_controller["pids"], "job/pids.max").strip() == "5"
    assert scope.usage().pids == 1
    before = len(descriptors())
    scope.close()
    scope.close()
    assert len(descriptors()) == before - len(tree.tops)


def test_adopted_scope_without_directories_is_killed_and_removed_by_its_name(
    tree: Tree, process: subprocess.Popen[bytes]
) -> None:
    tree.create("job").close()
    enter(tree, "job", process)
    tree.adopt("job").kill()
    assert process.wait() == -signal.SIGKILL
    tree.adopt("job").remove()
    assert holders(tree, "job") == 0
