"""Roles: their permissions, the jobs that they reach, and their quotas. Pure, one table.

A certificate's only OU is its role, and its only CN is its name; both are compared exactly. The
name is the tenant: two certificates of one name are one tenant, whatever their roles, because the
authority that signs the names vouches for them. A role with the scope `own` reaches the jobs of its
own name alone; for it, no other job exists.

`admin` and `viewer` are built in and cannot be redefined. So no change of the configuration can
give more rights to a certificate that was issued to a viewer. A role outside of the table may do
nothing.
"""

import re
from collections.abc import Iterator, Mapping
from enum import Enum

from attrs import field, frozen

from jobworker.errors import NotFound, PermissionDenied
from jobworker.model.bounds import within

_ROLE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


class Permission(Enum):
    """A permission that an operation needs."""

    RUN = "run"
    """Start jobs, and see the values of their variables."""
    STOP = "stop"
    REMOVE = "remove"
    """Remove ended jobs and their output; together with STOP, also live jobs (`force`)."""
    VIEW = "view"
    """See jobs, their states and their usage, but not their output."""
    LOG = "log"
    """Read the output of jobs."""
    VOLUMES = "volumes"
    """Create, list and remove volumes, and mount them in jobs; all names share them."""
    UNBOUNDED = "unbounded"
    """Request no time limit (timeout 0), as for a service that never ends."""


_DONE = {
    Permission.RUN: "run jobs",
    Permission.STOP: "stop jobs",
    Permission.REMOVE: "remove jobs or their output",
    Permission.VIEW: "see jobs",
    Permission.LOG: "read the output of jobs",
    Permission.VOLUMES: "use volumes",
    Permission.UNBOUNDED: "run jobs without a time limit, or beyond worker.max_job_timeout",
}
"""For error messages, in words: the action that each permission allows."""


SHARED = frozenset({Permission.VOLUMES})
"""Permissions on things that all names share. Only a role with the scope `all` can use them."""


class Scope(Enum):
    """The jobs that a role reaches: those of all names, or of its own."""

    ALL = "all"
    OWN = "own"


@frozen(kw_only=True)
class Quota:
    """The bounds on all live jobs of one name together, waiting ones included; 0 is no bound."""

    jobs: int = field(default=0, validator=within(0, 1_000_000))
    cpu_percent: int = field(default=0, validator=within(0, 1 << 40))
    """Sum of their CPU limits, in percent of one core."""
    memory_bytes: int = field(default=0, validator=within(0, 1 << 60))
    """Sum of their memory limits."""
    output_bytes: int = field(default=0, validator=within(0, 1 << 60))
    """Output on disk: the kept output of ended jobs, and the limits of live ones."""


NO_QUOTA = Quota()


@frozen(kw_only=True)
class Role:
    """A role: one row of the table."""

    name: str
    permissions: frozenset[Permission]
    scope: Scope = Scope.OWN
    quota: Quota = NO_QUOTA

    def may(self, permission: Permission) -> bool:
        """Whether the role has `permission`."""
        return permission in self.permissions

    def can_use(self, permission: Permission) -> bool:
        """Whether the role has `permission`, and the scope `all` if all names share its object."""
        return self.may(permission) and (permission not in SHARED or self.scope is Scope.ALL)

    def is_within(self, other: "Role") -> bool:
        """Whether `other` has all permissions of this role, on all jobs that this role reaches."""
        reaches = other.scope is Scope.ALL or self.scope is Scope.OWN
        return reaches and self.permissions <= other.permissions


BUILT_IN = (
    Role(name="admin", permissions=frozenset(Permission), scope=Scope.ALL),
    Role(
        name="viewer",
        permissions=frozenset({Permission.VIEW, Permission.LOG}),
        scope=Scope.ALL,
    ),
)


@frozen
class Roles:
    """The table of all roles, by name."""

    _rows: Mapping[str, Role] = field(factory=lambda: {role.name: role for role in BUILT_IN})

    @classmethod
    def with_own(cls, *own: Role) -> "Roles":
        """Make the table of the built-in roles and `own`, which must have other names."""
        return cls({role.name: role for role in (*own, *BUILT_IN)})

    def __iter__(self) -> Iterator[Role]:
        return iter(self._rows.values())

    def find(self, name: str) -> Role:
        """Return the role of exactly that name. Raises PermissionDenied."""
        role = self._rows.get(name)
        if role is None:
            raise PermissionDenied(
                f"cannot serve this certificate: its OU {name!r} is not a role of this server",
                remedy="use a certificate whose OU is one of " + ", ".join(sorted(self._rows)),
            )
        return role

    def authorize(self, name: str, permission: Permission, operation: str) -> Role:
        """Return the role if it may use `permission`. Raises PermissionDenied, which names
        `operation`."""
        role = self.find(name)
        if not role.may(permission):
            holders = sorted(each.name for each in self if each.can_use(permission))
            raise PermissionDenied(
                f"cannot call {operation}: the role {name!r} may not {_DONE[permission]} "
                f"(it lacks the permission {permission.value!r})",
                remedy="use a certificate of the role " + " or ".join(holders),
            )
        if not role.can_use(permission):
            raise PermissionDenied(
                f"cannot call {operation}: all names share the volumes, and the role {name!r} "
                "reaches its own jobs alone",
                remedy="use a certificate whose role has the scope 'all'",
            )
        return role


def role_name_fault(name: str) -> str | None:
    """Return why `name` cannot be a role of the configuration; None if it can.

    A name is ASCII, in lower case and without white space, so that no two names look alike.
    """
    if any(name == role.name for role in BUILT_IN):
        return f"{name!r} is built in and cannot be changed; choose another name"
    if not _ROLE_NAME.fullmatch(name):
        return f"{name!r} is not a name for a role: a to z first, then a to z, 0 to 9, '-' and '_'"
    return None


def no_such_job(job: int) -> NotFound:
    """The error for a job that does not exist, and for one that the caller may not see."""
    return NotFound(
        f"cannot find job {job}: no such job",
        remedy="see the ids in the list of jobs (`worker-cli list`)",
    )
