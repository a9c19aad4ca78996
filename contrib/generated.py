"""The parts of a document that a script writes.

They stand between `<!-- begin NAME -->` and `<!-- end NAME -->`.
`contrib/rooms.py` and `contrib/protocol_page.py` are such scripts. `make docs` runs them, and tests
run them with `--check`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

Section = Callable[[], list[str]]
"""A function that returns the lines of one part."""


def rendered(page: str, sections: Mapping[str, Section]) -> str:
    """The page with these parts made again. Raises SystemExit if the page lacks one of them."""
    for name, make in sections.items():
        body = "\n".join(make()).rstrip("\n")
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        marks = re.search(pattern, page, re.DOTALL)
        if marks is None:
            raise SystemExit(f"the page has no section named {name}")
        page = f"{page[: marks.start()]}{marks[1]}\n{body}\n\n{marks[2]}{page[marks.end() :]}"
    return page


def write_or_check(path: Path, sections: Mapping[str, Section], about: str) -> None:
    """Write the parts of the page at `path`. With `--check` only compare them, and exit with 1 if
    the page differs. `about` is the first line of `--help`.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if it differs")
    check = parser.parse_args().check
    page = path.read_text(encoding="utf-8")
    made = rendered(page, sections)
    if check and made != page:
        sys.exit(f"docs/{path.name} differs from the code; run `make docs`")
    if not check:
        path.write_text(made, encoding="utf-8")
