"""Roles: what each may do, upon whose jobs, and how much at once. Pure, one table.

A certificate's one OU is its role and its one CN its name, both compared exactly, character by
character. The name is the tenant: two certificates of one name are one tenant, whatever their
roles, since the authority that signs names answers for them. A role of the scope `own` reaches
the jobs of its own name alone; every other job does not exist for it.

`admin` and `viewer` are built in and cannot be redefined, so that no edit of the configuration
makes a certificate that was issued to look on able to act. A role that the table does not hold
may do nothing.
"""

import re
from collections.abc import Iterator, Mapping
from enum import Enum

from attrs import field, frozen

from jobworker.errors import NotFound, PermissionDenied
from jobworker.model.bounds import within

_ROLE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


class Permission(Enum):
    """What an operation needs."""

    RUN = "run"
    """Start jobs, and see the values of their variables."""
    STOP = "stop"
    REMOVE = "remove"
    """Remove ended jobs and their output; jobs that have not ended (`force`) with STOP besides."""
    VIEW = "view"
    """See jobs and how they do; not what they print."""
    LOG = "log"
    """Read what jobs print."""
    VOLUMES = "volumes"
    """Make, list and remove volumes, and have them in jobs; all share them."""
    UNBOUNDED = "unbounded"
    """Ask for no time limit (timeout 0), as for a service that runs for good."""


_DONE = {
    Permission.RUN: "run jobs",
    Permission.STOP: "stop jobs",
    Permission.REMOVE: "remove jobs or their output",
    Permission.VIEW: "look at jobs",
    Permission.LOG: "read what jobs print",
    Permission.VOLUMES: "use volumes",
    Permission.UNBOUNDED: "run jobs without a time limit, or beyond worker.max_job_timeout",
}
"""What a role may not do without a permission, in words."""


SHARED = frozenset({Permission.VOLUMES})
"""Permissions upon what all names share: only a role that reaches all of them can use these."""


class Scope(Enum):
    """Whose jobs a role reaches."""

    ALL = "all"
    OWN = "own"


@frozen(kw_only=True)
class Quota:
    """What the live jobs of one name may have together, waiting ones included; 0 is no bound."""

    jobs: int = field(default=0, validator=within(0, 1_000_000))
    cpu_percent: int = field(default=0, validator=within(0, 1 << 40))
    """Sum of their CPU limits, in percent of one core."""
    memory_bytes: int = field(default=0, validator=within(0, 1 << 60))
    """Sum of their memory limits."""
    output_bytes: int = field(default=0, validator=within(0, 1 << 60))
    """Output on disk: what is kept of ended jobs, and the caps of live ones."""


NO_QUOTA = Quota()


@frozen(kw_only=True)
class Role:
    """One row of the table."""

    name: str
    permissions: frozenset[Permission]
    scope: Scope = Scope.OWN
    quota: Quota = NO_QUOTA

    def may(self, permission: Permission) -> bool:
        """Whether the role holds `permission`."""
        return permission in self.permissions

    def can_use(self, permission: Permission) -> bool:
        """Whether the role holds `permission`, and reaches what that is about."""
        return self.may(permission) and (permission not in SHARED or self.scope is Scope.ALL)

    def is_within(self, other: "Role") -> bool:
        """Whether `other` may do all that this role may, upon all jobs that this role reaches."""
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
    """The table, by name."""

    _rows: Mapping[str, Role] = field(factory=lambda: {role.name: role for role in BUILT_IN})

    @classmethod
    def with_own(cls, *own: Role) -> "Roles":
        """The built-in roles and those of the configuration, whose names must not clash."""
        return cls({role.name: role for role in (*own, *BUILT_IN)})

    def __iter__(self) -> Iterator[Role]:
        return iter(self._rows.values())

    def find(self, name: str) -> Role:
        """The role of exactly that name. Raises PermissionDenied."""
        role = self._rows.get(name)
        if role is None:
            raise PermissionDenied(
                f"cannot serve this certificate: its OU {name!r} is no role of this server",
                remedy="use a certificate whose OU is one of " + ", ".join(sorted(self._rows)),
            )
        return role

    def authorize(self, name: str, permission: Permission, operation: str) -> Role:
        """The role, if it may use `permission`, else PermissionDenied; `operation` is for words."""
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
                f"cannot call {operation}: all share the volumes, and the role {name!r} "
                "reaches its own jobs alone",
                remedy="use a certificate whose role has the scope 'all'",
            )
        return role


def role_name_fault(name: str) -> str | None:
    """Say why `name` can be no role of the configuration; None if it can.

    Only what cannot be taken for another name by eye: ASCII, lower-case, no white space.
    """
    if any(name == role.name for role in BUILT_IN):
        return f"{name!r} is built in and cannot be changed; choose another name"
    if not _ROLE_NAME.fullmatch(name):
        return f"{name!r} is no name for a role: a to z first, then a to z, 0 to 9, '-' and '_'"
    return None


def no_such_job(job: int) -> NotFound:
    """What is told of a job that does not exist, and of one that the caller may not know of."""
    return NotFound(
        f"cannot find job {job}: no such job",
        remedy="see the ids in the list of jobs (`worker-cli list`)",
    )
