"""The launcher's first word to a service, before any request: that it is ready, or why not.

With it comes the version of the protocol (`sandbox.protocol.version`), which the service looks at
before the rest: that may be of any form where the version is another.

Pure, standard library only.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jobworker.sandbox.protocol import fields as f


class Ready(NamedTuple):
    """What the launcher is and can do."""

    kind: str
    """Of control groups: v1, v2 or hybrid."""
    gaps: tuple[str, ...]
    """What this host cannot enforce, in words."""
    policy: Mapping[str, object]
    """What it was told at its start, as `policy_message` writes it."""
    bounds_disks: bool
    """Whether each job has a disk of its own."""
    keeps_asks: bool
    """Whether it takes and keeps why a job is sent a signal, and gives up starts that nobody wants
    any more: one of before does not."""


class Unready(NamedTuple):
    """Why the launcher serves nobody, or not this service: an error of `jobworker.errors`."""

    code: int
    message: str
    remedy: str


_READY: f.Fields = (
    f.text("ready"),
    f.many("gaps", f.as_text),
    f.member("policy", f.as_object),
    f.flag("bounds_disks"),
    f.optional(f.flag("keeps_asks"), default=False),
)
_UNREADY: f.Fields = (f.count("code"), f.text("message"), f.text("remedy"))


def message_of(word: Ready | Unready) -> dict[str, object]:
    """The message that says it, the version aside."""
    if isinstance(word, Ready):
        return f.encode(_READY, word)
    return {"error": f.encode(_UNREADY, word)}


def refusal_in(message: f.Object) -> Unready | None:
    """Why the launcher does not serve; None where it does. Raises Malformed."""
    if "error" not in message:
        return None
    return f.decode(Unready, _UNREADY, f.as_object(message["error"], "error"))


def ready_from(message: f.Object) -> Ready:
    """What a launcher of the same version tells of itself. Raises Malformed."""
    return f.decode(Ready, _READY, message)
