"""Units that messages and documents tell people to start, reload or look at are shipped."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERB = r"(?:start|stop|reload|restart|status|enable)"
CALL = re.compile(rf"systemctl(?: --?[a-z-]+)* {VERB}([\w@. -]*)")


def test_units_that_are_named_are_shipped() -> None:
    shipped = {path.stem for path in (ROOT / "contrib").glob("*.service")}
    named: dict[str, str] = {}
    for directory, ends in (("src", "py"), ("docs", "md"), ("etc", "toml"), ("contrib", "service")):
        for path in (ROOT / directory).rglob(f"*.{ends}"):
            for found in CALL.finditer(path.read_text(encoding="utf-8")):
                named |= dict.fromkeys(_units(found[1]), str(path))
    for found in CALL.finditer((ROOT / "README.md").read_text(encoding="utf-8")):
        named |= dict.fromkeys(_units(found[1]), "README.md")
    assert len(named) > 1
    assert {unit: where for unit, where in named.items() if unit not in shipped} == {}


def _units(words: str) -> list[str]:
    return [word.strip(".").removesuffix(".service") for word in words.split() if word[0] != "-"]
