"""The launcher's protocol in one table: every operation that the service may request.

A row has the operation's name on the socket, the classes of its request and reply, and the fields
of both. Both sides use the table, and have no names or checks of their own:

    service                                                launcher
    request_message  {"id", "op", …}                    →  parse, and the function of the row
    read_reply       {"id", "ok": {…}} + descriptors    ←  answer
                     {"id", "error": {"step", "errno", "detail"}}

The launcher assumes a hostile service: `parse` refuses every message that fits no row, and names an
unknown member. A member that an earlier service or launcher does not send has a default in its row.
A change that an earlier version cannot work with needs a new `version.PROTOCOL`.

Pure, standard library only.
"""

from typing import Generic, NamedTuple, TypeVar, cast

from jobworker.errors import ProtocolError
from jobworker.sandbox.cgroup.accounting import ScopeUsage
from jobworker.sandbox.event_loop import TurnTimes
from jobworker.sandbox.protocol import fields as f
from jobworker.sandbox.protocol import replies as a
from jobworker.sandbox.protocol import requests as q

Q = TypeVar("Q", bound=q.Request)
A = TypeVar("A", bound=tuple[object, ...])
Reply = tuple[object, ...]
"""A named tuple of `replies`, or one of the launcher's own modules (Usage, TurnTimes)."""


class Operation(NamedTuple, Generic[Q, A]):
    """One row of the table: an operation, its request and its reply."""

    name: str
    request: type[Q]
    fields: f.Fields
    """The fields of the request; the first is `JOB` if the request is about a job."""
    reply: type[A]
    reply_fields: f.Fields = ()
    descriptors: int | None = 0
    """How many descriptors come with the reply; None if the reply itself has their number."""
    is_patient: bool = True
    """Whether the service waits for a silent launcher, since the life of a job depends on the
    request. It refuses any other request as `launcher_silent`."""
    may_be_large: bool = False
    """Whether the reply may be too large for a packet; then it comes in a file descriptor."""
    step: str = "request"
    """The name of the failed step in a refusal, if the fault itself names none."""


_START = (q.ORDER, q.LIMITS)

HELLO = Operation("hello", q.Hello, (q.VERSION,), a.Done)
PING = Operation("ping", q.Ping, (), a.Done)
SPAWN = Operation(
    "spawn", q.Spawn, (q.JOB, *_START), a.Spawned, a.SPAWNED, descriptors=2, step="spawn"
)
PLAN = Operation("plan", q.PlanOf, _START, a.Steps, a.STEPS, is_patient=False, may_be_large=True)
GIVE_UP = Operation("give_up", q.GiveUpStart, (q.JOB,), a.GivenUp, a.GIVEN_UP)
SIGNAL = Operation("signal", q.Signal, (q.JOB, q.SIGNAL, q.ASK), a.Delivered, a.DELIVERED)
KILL = Operation("kill", q.Kill, (q.JOB, q.ASK), a.Done)
REMOVE = Operation("remove", q.Remove, (q.JOB,), a.Done)
USAGE = Operation("usage", q.UsageOf, (q.JOB,), ScopeUsage, a.USAGE, is_patient=False)
LIST = Operation("list", q.ListJobs, (q.AFTER,), a.JobEntries, a.JOBS, descriptors=None)
TURNS = Operation("turns", q.TimesOfTurns, (), TurnTimes, a.TURNS)
PROMISED = Operation("promised", q.PromisedBytes, (), a.Promised, a.PROMISED, is_patient=False)
MAKE_VOLUME = Operation(
    "volume.create",
    q.MakeVolume,
    (q.VOLUME_NAME, q.VOLUME_SIZE, q.THIN),
    a.Done,
    is_patient=False,
)
REMOVE_VOLUME = Operation(
    "volume.remove", q.RemoveVolume, (q.VOLUME_NAME,), a.Done, is_patient=False
)
LIST_VOLUMES = Operation(
    "volume.list",
    q.ListVolumes,
    (),
    a.VolumeEntries,
    a.VOLUMES,
    is_patient=False,
    may_be_large=True,
)

ROWS = cast(
    "tuple[Operation[q.Request, Reply], ...]",
    (
        *(HELLO, PING, SPAWN, PLAN, GIVE_UP, SIGNAL, KILL, REMOVE, USAGE, LIST, TURNS, PROMISED),
        *(MAKE_VOLUME, REMOVE_VOLUME, LIST_VOLUMES),
    ),
)
_BY_NAME = {row.name: row for row in ROWS}
_BY_REQUEST = {row.request: row for row in ROWS}
_EVERYWHERE = frozenset({"id", "op", "job"})
"""Members that every request may have: some clients name a job in each."""


def operation_of(request: q.Request) -> Operation[q.Request, Reply]:
    """The row of a request."""
    return _BY_REQUEST[type(request)]


def request_message(number: int, request: q.Request) -> dict[str, object]:
    """The message of a request. The reply has the same number."""
    row = operation_of(request)
    return {"id": number, "op": row.name, **f.encode(row.fields, request)}


def parse(message: f.Object) -> tuple[int, q.Request]:
    """The number of the request, for the reply, and the request itself.

    Raises ProtocolError, which names the field.
    """
    try:
        number = f.as_integer(message.get("id"), "id", 0, q.MAX_NUMBER)
        return number, _parse(message)
    except f.Malformed as fault:
        raise ProtocolError(f"cannot take the request: {fault}") from None


def _parse(message: f.Object) -> q.Request:
    name = message.get("op")
    row = _BY_NAME.get(name) if type(name) is str else None
    if row is None:
        raise f.Malformed("op is none of the launcher's operations")
    known = _EVERYWHERE.union(*(field.names for field in row.fields))
    if unknown := message.keys() - known:  # else it would be dropped silently
        raise f.Malformed(f"it knows no field {min(unknown)[:64]!r}")
    return f.decode(row.request, row.fields, message)


def answer(operation: Operation[Q, A], reply: A) -> dict[str, object]:
    """The message of a reply, without its number."""
    return {"ok": f.encode(operation.reply_fields, reply)}


def read_reply(operation: Operation[Q, A], message: f.Object) -> A | a.Refusal:
    """The launcher's reply, or its refusal. Raises Malformed, with the operation's name."""
    refused = message.get("error")
    try:
        if refused is not None:
            return f.decode(a.Refusal, a.REFUSAL, f.as_object(refused, "error"))
        told = f.as_object(message.get("ok"), "ok")
        return f.decode(operation.reply, operation.reply_fields, told)
    except f.Malformed as fault:
        raise f.Malformed(f"the reply to {operation.name}: {fault}") from None
