"""What a tree makes, and what it removes of an earlier instance."""

import os
import signal

import pytest

from jobworker.sandbox.cgroup.tree import Tree

from .conftest import Start, enter, holders


@pytest.mark.parametrize("kills_groups", [True, False])
def test_sweep_ends_what_an_earlier_instance_left_and_keeps_scopes_of_its_own(
    tree: Tree, start: Start, kills_groups: bool
) -> None:
    if kills_groups and not tree.kills_groups:
        pytest.skip("the kernel has no cgroup.kill: that needs cgroup2 and Linux 5.14")
    tree.kills_groups = kills_groups
    own, process, left = tree.create("own"), start(), start()
    enter(tree, "own", process)
    for top in tree.tops:
        os.mkdir("left", dir_fd=top)
    enter(tree, "left", left)
    assert tree.sweep() == ["left"]
    assert left.wait() == -signal.SIGKILL
    assert holders(tree, "left") == 0
    assert holders(tree, "own") == len(tree.tops)
    assert process.poll() is None
    assert tree.sweep() == []
    own.close()
