#!/usr/bin/env python3
"""Draw the rooms of src/jobworker into docs/architecture.md; with --check, only check the picture.

A room is a package. An arrow means that a module of one room imports a module of another, even
if only a type checker sees the import (`if TYPE_CHECKING`). The picture leaves out an arrow that
a path of other arrows implies. It also leaves out the modules beside the rooms (`errors`, `convert`
and the like), which every room may import. `make docs` writes the picture, a test compares it.
"""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

from generated import write_or_check

ROOT = Path(__file__).parent.parent
SOURCE, PAGE = ROOT / "src" / "jobworker", ROOT / "docs" / "architecture.md"
PACKAGE = "jobworker"

Graph = dict[str, set[str]]
"""The names that each name imports."""


def modules() -> dict[str, Path]:
    """The path of each module by its dotted name, packages without `__init__`."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> Graph:
    """The modules that each module imports, at any place in its file."""
    known = modules()
    return {name: set(_imported(path, known)) - {name} for name, path in known.items()}


def _imported(path: Path, known: Iterable[str]) -> Iterable[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known or node.module in known:
                    yield inner if inner in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def room_of(module: str, known: Mapping[str, Path]) -> str:
    """The package of a module, below `jobworker`; "" for the modules beside the rooms."""
    package = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
    return package.removeprefix(PACKAGE).removeprefix(".")


def rooms() -> Graph:
    """The rooms that each room imports from."""
    known, graph = modules(), Graph()
    for module, imported in imports().items():
        room = room_of(module, known)
        others = graph.setdefault(room, set())
        others |= {room_of(each, known) for each in imported} - {room, ""}
    graph.pop("", None)
    return graph


def circles(graph: Graph) -> list[set[str]]:
    """The sets of names that import each other, directly or not. None if imports run one way."""
    reached = {name: _reach(graph, name) for name in graph}
    found: list[set[str]] = []
    for name in graph:
        circle = {other for other in reached[name] if name in reached[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


def _reach(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    left = [start]
    while left:
        for name in graph.get(left.pop(), ()):
            if name not in seen:
                seen.add(name)
                left.append(name)
    return seen


def reduced(graph: Graph) -> Graph:
    """The graph without the arrows that other arrows imply."""
    return {
        name: {
            other
            for other in others
            if not any(other in _reach(graph, between) for between in others - {other})
        }
        for name, others in graph.items()
    }


def picture(graph: Graph) -> list[str]:
    """The lines of a flow chart of Mermaid that shows the rooms."""
    lines = ["```mermaid", "flowchart TD"]
    houses: dict[str, list[str]] = {}
    for room in sorted(graph):
        houses.setdefault(room.partition(".")[0], []).append(room)
    for house, inside in houses.items():
        if len(inside) == 1:
            lines.append(f"    {_node(house)}[{house}/]")
            continue
        lines.append(f"    subgraph {house}-rooms [{house}/]")
        lines += [f"        {_node(room)}[{room.replace('.', '/')}/]" for room in inside]
        lines.append("    end")
    for room, others in sorted(reduced(graph).items()):
        lines += [f"    {_node(room)} --> {_node(other)}" for other in sorted(others)]
    return [*lines, "```"]


def _node(room: str) -> str:
    return room.replace(".", "_")


if __name__ == "__main__":
    write_or_check(PAGE, {"rooms": lambda: picture(rooms())}, __doc__.partition("\n")[0])
