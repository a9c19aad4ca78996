"""What a tree makes, and what it removes of an earlier instance."""

import os
import signal

from jobworker.sandbox.cgroup.tree import Tree

from .conftest import Start, enter, holders


def test_sweep_ends_what_an_earlier_instance_left_and_keeps_scopes_of_its_own(
    tree: Tree, start: Start
) -> None:
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
