"""The authorization: it authorizes every call of every client, before an operation gets it.

The authorization checks two things, in this order. First, may the caller's role make this call
(PermissionDenied)? The row of the table of methods says which permissions the call needs; they may
depend on its parameters. Second, does each job that the parameters name exist for the caller
(NotFound)? The authorization finds these jobs by the types of the parameters: each value of the
type `JobId`, at whatever depth, refers to a job, and the authorization looks it up. So the
authorization also covers an operation that is added to the table of methods, without a line of its
own. The caller may touch each job that an operation gets by name. An operation that returns jobs
that were not named (a list, say) reads `Caller.only_owner`.

The table of roles may change while connections are open (a reload). The authorization uses the
table as it is at the moment of the call.
"""

import types
import typing
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import cache

import attrs
from attrs import AttrsInstance, define, frozen

from jobworker.model.access import Permission, Role, Roles, Scope, no_such_job
from jobworker.model.job import JobId, JobRecord
from jobworker.pki.identity import Identity
from jobworker.protocol.methods import Method
from jobworker.server.delivery.subscriptions import Subscriptions
from jobworker.server.fairness.call_budget import CallCost

FindJob = Callable[[JobId], Awaitable[JobRecord]]
"""Find a job by id, whoever owns it; raises NotFound."""


@define(eq=False)
class Authorization:
    """Authorizes calls by the current table of roles."""

    roles: Roles
    longest_seconds: float
    """The longest time limit that a job may have if its caller lacks the permission `unbounded`."""

    def check_role(self, who: Identity, method: Method) -> None:
        """Raise PermissionDenied if no call of the method may pass, whatever its parameters."""
        self.roles.authorize(who.role, method.permission, method.name)

    async def check_call(
        self, who: Identity, method: Method, params: object, find: FindJob
    ) -> None:
        """Return if the caller may make this call; else raise PermissionDenied or NotFound."""
        for permission, what in method.needs(params, self.longest_seconds):
            self.roles.authorize(who.role, permission, what)
        role = self.roles.find(who.role)
        if role.scope is Scope.ALL:  # the operation itself raises NotFound for a missing job
            return
        for job in jobs_named(params):
            record = await find(job)
            if record.owner != who.common_name:
                raise no_such_job(job)


@frozen(kw_only=True)
class Caller:
    """The client that makes a call: its identity, and the subscriptions of its connection."""

    identity: Identity
    subscriptions: Subscriptions
    authorization: Authorization
    peer: str
    """ADDRESS:PORT."""
    cost: CallCost
    """What the call costs while it is served."""

    @property
    def role(self) -> Role:
        """The caller's role in the current table. Raises PermissionDenied if it is gone."""
        return self.authorization.roles.find(self.identity.role)

    @property
    def only_owner(self) -> str | None:
        """The one owner whose jobs the caller may know of; None stands for every owner."""
        return None if self.role.scope is Scope.ALL else self.identity.common_name

    def show(self, record: JobRecord) -> JobRecord:
        """A record as this caller may see it: only callers that may run jobs see variables' values.

        Summaries have no variables, so all callers get the same ones.
        """
        return record if self.role.may(Permission.RUN) else record.masked()


def jobs_named(params: object) -> Iterator[JobId]:
    """Every job that parameters refer to: each value in a place of the type `JobId`."""
    for place in attrs.fields(typing.cast("type[AttrsInstance]", type(params))):
        yield from _named(place.type, getattr(params, place.name))


@cache
def _may_name(kind: object) -> bool:
    """Whether a value in a place of this type can hold a job's id, at whatever depth."""
    assert not isinstance(kind, str), "a postponed annotation would hide what stands there"
    if kind in (JobId, object, typing.Any):
        return True
    if isinstance(kind, type) and attrs.has(kind):
        return any(_may_name(place.type) for place in attrs.fields(kind))
    if typing.get_origin(kind) is typing.Literal:  # its arguments are values
        return False
    return any(map(_may_name, typing.get_args(kind)))


def _named(kind: object, value: object) -> Iterator[JobId]:
    if not _may_name(kind):  # a job's variables, say, of which there may be thousands
        return
    inner, origin = typing.get_args(kind), typing.get_origin(kind)
    if kind is JobId and isinstance(value, int):
        yield JobId(value)
    elif attrs.has(type(value)):
        yield from jobs_named(value)
    elif origin in (typing.Union, types.UnionType):
        for alternative in inner:
            yield from _named(alternative, value)
    elif origin is tuple and isinstance(value, tuple):
        for content in value:
            yield from _named(inner[0], content)
    elif isinstance(value, Mapping) and len(inner) == 2:
        for pair in value.items():
            for part, content in zip(inner, pair, strict=True):
                yield from _named(part, content)
