"""The threat model names tests and attempts that exist."""

import re
from pathlib import Path

from tests.security.sandbox import attempts_calls, attempts_files
from tests.security.sandbox.attempt import ATTEMPTS

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "threat-model.md").read_text(encoding="utf-8")

assert attempts_calls, attempts_files  # they fill the table of attempts


def test_tests_that_are_named_exist() -> None:
    named = set(re.findall(r"`(test_\w+)::(test_\w+)`", TEXT))
    assert len(named) > 20
    sources: dict[str, str] = {}
    for path in TESTS.rglob("test_*.py"):  # one name may stand among units and elsewhere
        sources[path.stem] = sources.get(path.stem, "") + path.read_text(encoding="utf-8")
    missing = [(file, name) for file, name in named if f"def {name}(" not in sources.get(file, "")]
    assert missing == []


def test_attempts_that_are_named_exist() -> None:
    rows = [row for row in TEXT.splitlines() if row.startswith("| ") and "attempt" in row]
    named = {
        name
        for row in rows
        for part in re.findall(r"attempts? ((?:`[\w: ]+`(?:, )?)+)", row)
        for name in re.findall(r"`([\w: ]+)`", part)
    }
    assert len(named) > 30
    assert named - set(ATTEMPTS) == set()
