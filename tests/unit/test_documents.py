"""The documents name what exists: their links lead somewhere, and so do the paths in them."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import jobworker

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "jobworker"
DOCUMENTS = sorted(
    path
    for place in (".", "docs", "docs/decisions", "examples", "contrib/clients", ".github")
    for path in (ROOT / place).glob("*.md")
)
WITH_PATHS = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "docs/glossary.md")),
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
]
"""Those that say of every path that it is there now."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def links(text: str) -> Iterator[str]:
    """Where a document's links lead within the repository."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            yield target


def headings(path: Path) -> set[str]:
    """The anchors of a document's headings."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(document: Path) -> None:
    broken = []
    for link in links(document.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = (document.parent / file) if file else document
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("document", WITH_PATHS, ids=name_of)
def test_paths_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+\.(?:py|toml|md|sh|S))`", text)) - {"worker.toml"}
    missing = {path for path in named if not any((at / path).exists() for at in (ROOT, PACKAGE))}
    # A second probe of a row is named by its file alone, beside the first.
    assert {path for path in missing if not list(PACKAGE.rglob(path))} == set()


def test_every_decision_is_in_the_index_under_its_number_and_title() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    pages = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        first = page.read_text(encoding="utf-8").partition("\n")[0]
        number, title = re.fullmatch(r"# (\d+)\. (.*)", first).groups()  # type: ignore[union-attr]
        assert int(number) == int(page.name[:4])
        assert f"| [{number}]({page.name}) | {title[0].lower()}{title[1:]} |" in index or (
            f"| [{number}]({page.name}) | {title} |" in index
        )


def test_every_decision_has_its_parts() -> None:
    for page in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        parts = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert parts == ["Context", "Decision", "Rejected", "Consequences"], page.name


def test_page_of_the_api_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\.\. auto\w+:: (\w+)", page, re.MULTILINE))
    assert set(jobworker.__all__) - {"__version__"} <= shown


def test_site_has_every_document() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {line.strip() for line in index.splitlines()}
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= listed
    assert {f"../{name}" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")} <= listed
