"""The directories in which scopes stand: which are open, and what holds for all scopes in them."""

import os

import pytest

from jobworker.sandbox.cgroup import files
from jobworker.sandbox.cgroup.none import NoTree
from jobworker.sandbox.cgroup.tree import Tree

from ....descriptors import descriptors


def test_directories_of_which_one_is_missing_are_not_opened(tree: Tree) -> None:
    if len(tree.tops) < 2:
        pytest.skip("the kernel has a single hierarchy of control groups")
    os.mkdir("part", dir_fd=tree.tops[0])
    before = len(descriptors())
    with pytest.raises(FileNotFoundError):
        tree.open_directories("part")
    assert len(descriptors()) == before


def test_all_scopes_together_have_a_bound_on_their_processes(tree: Tree) -> None:
    tree.bound_processes(1234)
    assert files.read(tree.by_controller["pids"], "pids.max").strip() == "1234"
    NoTree("none", "").bound_processes(1234)
