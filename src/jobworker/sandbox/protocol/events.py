"""The launcher's events in one table: the end of a job, and the end of a job's network.

The launcher sends an event without a request. Each row has the event's name on the socket, its
class and its fields. The launcher makes a message by `message_of`, and the service reads it by
`read`. The service ignores an event with an unknown name: a later launcher has sent it.

Pure, standard library only.
"""

from typing import NamedTuple

from jobworker.sandbox.cgroup.accounting import ScopeUsage
from jobworker.sandbox.protocol import fields as f
from jobworker.sandbox.protocol import replies as r


class JobEnded(NamedTuple):
    """A job's first process has ended."""

    job: int
    seconds_ago: float
    """The time since its end: the launcher sends the event once the job's volumes are written out.
    """
    how: r.HowEnded
    usage: ScopeUsage
    measured: bool
    """Whether `usage` could be read."""


class NetworkEnded(NamedTuple):
    """A job's private network has ended; the job goes on without it."""

    job: int
    why: str


Event = JobEnded | NetworkEnded


class _Row(NamedTuple):
    name: str
    event: type[Event]
    fields: f.Fields


_ROWS = (
    _Row(
        "exit",
        JobEnded,
        (f.count("job"), r.SINCE_END, f.flat(r.HowEnded, r.HOW_ENDED), r.USED, r.MEASURED),
    ),
    _Row("network_ended", NetworkEnded, (f.count("job"), f.text("why"))),
)
_BY_NAME: dict[object, _Row] = {row.name: row for row in _ROWS}
_BY_CLASS: dict[type, _Row] = {row.event: row for row in _ROWS}


def message_of(event: Event) -> dict[str, object]:
    """The message for an event."""
    row = _BY_CLASS[type(event)]
    return {"event": row.name, **f.encode(row.fields, event)}


def read(message: f.Object) -> Event | None:
    """The event in a message; None if the message is a reply or an unknown event.

    Raises Malformed, with the event's name.
    """
    name = message.get("event")
    row = _BY_NAME.get(name) if isinstance(name, str) else None
    if row is None:
        return None
    try:
        return f.decode(row.event, row.fields, message)
    except f.Malformed as fault:
        raise f.Malformed(f"the event {row.name}: {fault}") from None
