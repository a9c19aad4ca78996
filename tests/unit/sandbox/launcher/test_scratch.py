"""Removing what a job left: any shape of tree goes, and nothing outside of it is touched."""

import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.sandbox.launcher.scratch import remove_tree

from ....descriptors import descriptors
from ...strategies import examples

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IMMUTABLE_FL = 0x80086601, 0x40086602, 0x10
"""linux/fs.h; chattr(1) +i."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "job-1"
    path.mkdir()
    return path


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A directory beside the tree, which must be the same after the test."""
    outside = tmp_path / "outside"
    (outside / "below").mkdir(parents=True)
    (outside / "file").write_text("canary")
    (outside / "below" / "file").write_text("canary")
    yield outside
    assert (outside / "file").read_text() == "canary"
    assert (outside / "below" / "file").read_text() == "canary"
    assert sorted(os.listdir(outside)) == ["below", "file"]


def test_tree_goes_with_all_that_it_holds(tree: Path) -> None:
    (tree / "a" / "b" / "c").mkdir(parents=True)
    (tree / "a" / "empty").mkdir()
    for path in ("file", "a/file", "a/b/file", "a/b/c/file"):
        (tree / path).write_text("x")
    remove_tree(str(tree))
    assert not tree.exists()
    assert tree.parent.exists()


def test_tree_that_is_gone_already_is_fine(tree: Path) -> None:
    remove_tree(str(tree / "absent"))
    remove_tree(str(tree))
    remove_tree(str(tree))


def test_tree_of_three_thousand_levels_goes(tree: Path) -> None:
    # 3,000 names of 10 bytes exceed PATH_MAX, and the interpreter's bound on recursion.
    directory = os.open(tree, os.O_RDONLY)
    for level in range(3000):
        os.mkdir("directory!", dir_fd=directory)
        if level % 500 == 0:
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
        below = os.open("directory!", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    try:
        remove_tree(str(tree))
        assert not tree.exists()
    finally:  # what is left is beyond pytest's own clean-up, in this run and all later ones
        subprocess.run(["rm", "-rf", str(tree)], check=True)


def test_links_are_removed_and_never_followed(tree: Path, canary: Path) -> None:
    (tree / "deep" / "deeper").mkdir(parents=True)
    for place in (tree, tree / "deep", tree / "deep" / "deeper"):
        (place / "to-file").symlink_to(canary / "file")
        (place / "to-directory").symlink_to(canary)
        (place / "to-root").symlink_to("/")
        (place / "up").symlink_to("../" * 40)
        (place / "nowhere").symlink_to("nowhere/at/all")
        (place / "itself").symlink_to("itself")
        (place / "hard").hardlink_to(canary / "file")
    remove_tree(str(tree))
    assert not tree.exists()


def test_path_that_is_a_link_or_a_file_is_refused(tree: Path, canary: Path) -> None:
    (tree / "link").symlink_to(canary)
    (tree / "file").write_text("x")
    for name in ("link", "file"):
        with pytest.raises(NotADirectoryError):
            remove_tree(str(tree / name))
        assert os.path.lexists(tree / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the mode of a directory binds others")
def test_directories_without_any_permission_go(tree: Path) -> None:
    (tree / "closed" / "inner").mkdir(parents=True)
    (tree / "closed" / "inner" / "file").write_text("x")
    for path in (tree / "closed" / "inner" / "file", tree / "closed" / "inner", tree / "closed"):
        path.chmod(0)
    tree.chmod(0)
    remove_tree(str(tree))
    assert not tree.exists()


NAMES = [
    *(b" ", b"-rf", b"*", b"...", b"..a", b"a\nb", b"\n", b"\x01", b"\xff\xfe", b"\\", b"'\""),
    *(b"x" * 255, b"\xf0\x9f\x92\xa9", b".removing-1", b".removing-2", b"~", b"$(reboot)"),
]


def test_odd_names_go(tree: Path) -> None:
    for at in (b"", b"/below", b"/below/more"):
        place = os.fsencode(tree) + at
        os.makedirs(place, exist_ok=True)
        for name in NAMES:
            os.mkdir(place + b"/" + name)
            Path(os.fsdecode(place + b"/" + name + b"/inner")).mkdir()
            with open(place + b"/" + name + b"/" + name, "wb"):
                pass
    remove_tree(str(tree))
    assert not tree.exists()


def test_what_an_earlier_removal_left_half_done_goes(tree: Path) -> None:
    for number in range(1, 6):
        (tree / f".removing-{number}" / "inner" / "more").mkdir(parents=True)
        (tree / f".removing-{number}" / "file").write_text("x")
    (tree / ".removing-7").write_text("x")
    (tree / "tmp" / "a" / "b").mkdir(parents=True)
    remove_tree(str(tree))
    assert not tree.exists()


def test_special_files_go_unopened(tree: Path) -> None:
    (tree / "below").mkdir()
    for place in (tree, tree / "below"):
        os.mkfifo(place / "fifo")  # to open it would block for ever
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(place / "socket"))
    remove_tree(str(tree))
    assert not tree.exists()


def test_no_descriptor_is_left_open(tree: Path) -> None:
    (tree / "a" / "b").mkdir(parents=True)
    before = len(descriptors())
    remove_tree(str(tree))
    with pytest.raises(NotADirectoryError):
        remove_tree("/dev/null")
    assert len(descriptors()) == before


def _set_immutable(path: Path, on: bool) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        raw = fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, bytes(8))
        flags = struct.unpack("l", raw)[0]
        flags = flags | FS_IMMUTABLE_FL if on else flags & ~FS_IMMUTABLE_FL
        fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, struct.pack("l", flags))
    finally:
        os.close(descriptor)


@contextmanager
def unyielding(directory: Path) -> Iterator[None]:
    """A directory whose entries the kernel does not let this process remove."""
    if os.geteuid() != 0:
        directory.chmod(0o500)
        try:
            yield
        finally:
            directory.chmod(0o700)
        return
    try:
        _set_immutable(directory, True)
    except OSError as error:
        pytest.skip(f"the file system of {directory} has no immutable flag: {error.strerror}")
    try:
        yield
    finally:
        for entry in [directory, *directory.parent.parent.rglob("*")]:
            if entry.is_dir() and entry.exists():
                _set_immutable(entry, False)


@pytest.mark.parametrize("name", ["a", "m", "z"])
def test_refusal_is_raised_once_all_else_has_gone(tree: Path, name: str) -> None:
    for directory in ("b", "m/held", "a/held", "z/held", "zz/b"):
        (tree / directory).mkdir(parents=True)
        (tree / directory / "file").write_text("x")
    for number in range(20):  # whatever the order in which the file system lists them
        (tree / name / f"sibling-{number}").mkdir()
        (tree / name / f"file-{number}").write_text("x")
    with unyielding(tree / name / "held"), pytest.raises(PermissionError):
        remove_tree(str(tree))
    left = [path for path in tree.rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["file"]
    assert not list(tree.rglob("sibling-*"))
    remove_tree(str(tree))
    assert not tree.exists()


shapes: st.SearchStrategy[dict[str, object]] = st.recursive(
    st.dictionaries(st.sampled_from("abc"), st.none(), max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner | st.none(), max_size=4),
    max_leaves=20,
)


def grow(place: Path, shape: dict[str, object], outside: Path) -> None:
    place.mkdir()
    for name, below in shape.items():
        if isinstance(below, dict):
            grow(place / name, below, outside)
        else:
            (place / name).symlink_to(outside)


@examples(max_examples=60)
@given(shapes)
def test_tree_of_any_shape_goes(
    tmp_path_factory: pytest.TempPathFactory, shape: dict[str, object]
) -> None:
    at = tmp_path_factory.mktemp("shape")
    (at / "outside").mkdir()
    (at / "outside" / "file").write_text("canary")
    grow(at / "tree", shape, at / "outside")
    remove_tree(str(at / "tree"))
    assert os.listdir(at) == ["outside"]
    assert (at / "outside" / "file").read_text() == "canary"


# --- the usual case -------------------------------------------------------------------------
