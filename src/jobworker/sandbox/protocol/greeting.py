"""The launcher's first message to a service, before any request: it is ready, or why it is not.

The message has the version of the protocol (`sandbox.protocol.version`). The service checks the
version first, since in another version the rest may have any form.

Pure, standard library only.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jobworker.sandbox.protocol import fields as f


class Ready(NamedTuple):
    """The launcher serves this service; its properties and its policy."""

    kind: str
    """The kind of control groups: v1, v2 or hybrid."""
    gaps: tuple[str, ...]
    """Sentences about limits that this host cannot enforce."""
    policy: Mapping[str, object]
    """The policy that it got at its start, in the form of `policy_message`."""
    bounds_disks: bool
    """Whether each job has a disk of its own."""
    keeps_asks: bool
    """Whether it keeps the ask that comes with a signal, and can give up a start (`GiveUpStart`). A
    launcher of an earlier version does neither."""


class NotReady(NamedTuple):
    """Why the launcher serves no service, or not this one: an error of `jobworker.errors`."""

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


def message_of(word: Ready | NotReady) -> dict[str, object]:
    """The message for it, without the version."""
    if isinstance(word, Ready):
        return f.encode(_READY, word)
    return {"error": f.encode(_UNREADY, word)}


def refusal_in(message: f.Object) -> NotReady | None:
    """The reason if the launcher does not serve this service, else None. Raises Malformed."""
    if "error" not in message:
        return None
    return f.decode(NotReady, _UNREADY, f.as_object(message["error"], "error"))


def ready_from(message: f.Object) -> Ready:
    """The properties of a launcher of the same version. Raises Malformed."""
    return f.decode(Ready, _READY, message)
