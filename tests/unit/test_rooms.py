"""The tree's rooms: imports run one way, and the picture of them is true."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "contrib"))

import rooms  # noqa: E402


def test_no_two_files_import_each_other() -> None:
    assert rooms.circles(rooms.imports()) == []


def test_no_two_rooms_import_each_other() -> None:
    assert rooms.circles(rooms.rooms()) == []


@pytest.mark.parametrize(
    ("graph", "circles"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [{"a", "b", "c"}]),
    ],
)
def test_circle_is_found(graph: rooms.Graph, circles: list[set[str]]) -> None:
    assert rooms.circles(graph) == circles


def test_arrow_that_others_imply_is_left_out() -> None:
    graph: rooms.Graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert rooms.reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_picture_is_what_the_code_would_draw() -> None:
    done = subprocess.run(
        [sys.executable, "contrib/rooms.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
