"""Roles and what each may do: pure, one table.

The role is the one OU of the client's certificate, compared exactly. A role that the table
does not hold may do nothing.
"""

from enum import Enum

from jobworker.errors import PermissionDenied


class Permission(Enum):
    """What an operation needs."""

    RUN = "run"
    STOP = "stop"
    VIEW = "view"


ROLES: dict[str, frozenset[Permission]] = {
    "admin": frozenset(Permission),
    "viewer": frozenset({Permission.VIEW}),
}


def may(role: str, permission: Permission) -> bool:
    """Whether `role` holds `permission`."""
    return permission in ROLES.get(role, frozenset())


def require_role(role: str) -> None:
    """Raise PermissionDenied unless `role` is a known one."""
    if role not in ROLES:
        raise PermissionDenied(
            f"cannot serve this certificate: its OU {role!r} is no role of this server",
            remedy="use a certificate whose OU is one of " + ", ".join(sorted(ROLES)),
        )


def authorize(role: str, permission: Permission, operation: str) -> None:
    """Raise PermissionDenied unless `role` holds `permission`; `operation` is for the message."""
    if not may(role, permission):
        holders = [name for name, held in sorted(ROLES.items()) if permission in held]
        raise PermissionDenied(
            f"cannot call {operation}: the role {role!r} may not {permission.value}",
            remedy="use a certificate of the role " + " or ".join(holders),
        )
