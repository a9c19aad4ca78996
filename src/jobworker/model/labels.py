"""Labels: short names and values by which the owner of a job finds it again.

A name has letters and digits, with ".", "_", "-" and "/" between them. So a query, a table or a
shell needs no quotes for it. A value is printable text, or empty.
"""

import re
from collections.abc import Mapping

from jobworker.model.bounds import states

MAX_LABELS = 64
MAX_LABEL_NAME = 63
MAX_LABEL_VALUE = 255

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?")


@states(
    maxProperties=MAX_LABELS,
    propertyNames={"pattern": f"^{_NAME.pattern}$", "maxLength": MAX_LABEL_NAME},
    additionalProperties={"type": "string", "maxLength": MAX_LABEL_VALUE},
)
def check_labels(_: object, __: object, labels: Mapping[str, str]) -> None:
    """A validator of attrs: raises ValueError for the first invalid label."""
    if len(labels) > MAX_LABELS:
        raise ValueError(f"has {len(labels)} labels; at most {MAX_LABELS} are allowed")
    for name, value in labels.items():
        if len(name) > MAX_LABEL_NAME or not _NAME.fullmatch(name):
            raise ValueError(
                f"{name[:80]!r} is not a name for a label (at most {MAX_LABEL_NAME} letters, "
                "digits, '.', '_', '-' and '/', the first and last a letter or digit)"
            )
        if len(value) > MAX_LABEL_VALUE or not value.isprintable():
            raise ValueError(
                f"the value of {name} must be at most {MAX_LABEL_VALUE} printable characters"
            )
