"""Roles: what each may do, and that nothing but an exact name is one."""

import pytest

from jobworker.errors import PermissionDenied
from jobworker.model.access import ROLES, Permission, authorize, may, require_role

NO_ROLES = ["", "Admin", "ADMIN", "admin ", " admin", "admin\0", "viewers", "root", "admin,viewer"]


def test_admin_may_do_everything_and_viewer_only_look() -> None:
    assert {
        "admin": {Permission.RUN, Permission.STOP, Permission.VIEW},
        "viewer": {Permission.VIEW},
    } == ROLES


@pytest.mark.parametrize("permission", Permission)
@pytest.mark.parametrize("role", [*ROLES, *NO_ROLES])
def test_role_is_held_to_the_table(role: str, permission: Permission) -> None:
    allowed = role == "admin" or (role, permission) == ("viewer", Permission.VIEW)
    assert may(role, permission) == allowed
    if allowed:
        authorize(role, permission, "job.x")
        return
    with pytest.raises(PermissionDenied, match=r"cannot call job\.x") as caught:
        authorize(role, permission, "job.x")
    assert "admin" in caught.value.remedy


@pytest.mark.parametrize("role", NO_ROLES)
def test_name_that_is_no_role_is_refused_with_those_that_are(role: str) -> None:
    with pytest.raises(PermissionDenied) as caught:
        require_role(role)
    assert repr(role) in caught.value.message
    assert caught.value.remedy.endswith("admin, viewer")


def test_known_roles_are_let_through() -> None:
    for role in ROLES:
        require_role(role)
