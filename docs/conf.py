"""How Sphinx makes pages of the documents and of the Python API: `make site`.

The source directory is the repository's root, not `docs/`: README and the other documents are pages
where they stand, so their links to one another are right here and in a repository browser alike.
Nothing is fetched while the site is built.
"""

import inspect
from typing import Any

import jobworker
from jobworker import errors

project = "jobworker"
author = "the jobworker contributors"
project_copyright = "the jobworker contributors; MIT licence"
version = release = jobworker.__version__

extensions = ["sphinx.ext.autodoc", "myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "examples/README.md", "contrib/clients/README.md"]
source_suffix = {".md": "markdown"}

default_role = "code"  # docstrings write `names` as the rest of the project does
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True}
python_maximum_signature_line_length = 88

myst_heading_anchors = 4
myst_enable_extensions = ["substitution"]
# Replies and configuration are shown with parts left out ("…"), which no lexer takes.
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_title = f"jobworker {release}"
html_copy_source = False


def error_table() -> str:
    """Every error as a row: what it means, its code on the wire, the exit code of `worker-cli`."""
    classes = [
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.JobworkerError) and cls is not errors.JobworkerError
    ]
    rows = ["| class | name | code | exit code | situation |", "|---|---|---|---|---|"]
    for cls in sorted(classes, key=lambda cls: -cls.code if cls.code < 0 else cls.code):
        situation = (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")
        rows.append(
            f"| `{cls.__name__}` | `{cls.name}` | {cls.code} | {cls.exit_code} | {situation} |"
        )
    return "\n".join(rows)


myst_substitutions = {"errors": error_table()}


def shorten_factories(*event: Any) -> tuple[str | None, str | None]:
    """Write `...` for a default that attrs makes anew for each object, and calls NOTHING."""
    *_, signature, returned = event
    return signature and signature.replace("= NOTHING", "= ..."), returned


def setup(app: Any) -> None:
    """Be the hook that Sphinx calls."""
    app.connect("autodoc-process-signature", shorten_factories)
