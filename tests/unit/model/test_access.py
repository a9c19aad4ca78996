"""Roles: what each may do, and that nothing but an exact name is one."""

import pytest

from jobworker.errors import PermissionDenied
from jobworker.model.access import (
    BUILT_IN,
    Permission,
    Quota,
    Role,
    Roles,
    Scope,
    role_name_fault,
)

NO_ROLES = [
    *("", "Admin", "ADMIN", "admin ", " admin", "admin\0", "viewers", "root", "admin,viewer"),
    *("аdmin", "admin\u200b", "ａdmin", "admin\u00ad", "OU=admin"),  # noqa: RUF001
]
TENANT = Role(
    name="tenant",
    permissions=frozenset({Permission.VIEW, Permission.RUN}),
    quota=Quota(jobs=2),
)


def test_admin_may_do_everything_and_viewer_only_look_and_both_reach_every_job() -> None:
    admin, viewer = BUILT_IN
    assert admin.permissions == frozenset(Permission)
    assert viewer.permissions == {Permission.VIEW, Permission.LOG}
    assert admin.scope is viewer.scope is Scope.ALL
    assert admin.quota == viewer.quota == Quota()


@pytest.mark.parametrize("permission", Permission)
@pytest.mark.parametrize("name", ["admin", "viewer", "tenant"])
def test_role_is_held_to_the_table(name: str, permission: Permission) -> None:
    roles = Roles.with_own(TENANT)
    held = {
        "admin": frozenset(Permission),
        "viewer": {Permission.VIEW, Permission.LOG},
        "tenant": TENANT.permissions,
    }[name]
    if permission in held:
        assert roles.authorize(name, permission, "job.x").name == name
        return
    with pytest.raises(PermissionDenied, match=r"cannot call job\.x") as caught:
        roles.authorize(name, permission, "job.x")
    assert "admin" in caught.value.remedy


def test_what_all_share_takes_a_role_that_reaches_all() -> None:
    for scope in Scope:
        role = Role(name="builder", permissions=frozenset({Permission.VOLUMES}), scope=scope)
        roles = Roles.with_own(role)
        if scope is Scope.ALL:
            assert roles.authorize("builder", Permission.VOLUMES, "volume.list") is role
            continue
        with pytest.raises(PermissionDenied, match="all names share the volumes") as caught:
            roles.authorize("builder", Permission.VOLUMES, "volume.list")
        assert "'all'" in caught.value.remedy


@pytest.mark.parametrize("name", NO_ROLES)
def test_name_that_is_no_role_is_refused_with_those_that_are(name: str) -> None:
    roles = Roles.with_own(TENANT)
    with pytest.raises(PermissionDenied) as caught:
        roles.find(name)
    assert repr(name) in caught.value.message
    assert caught.value.remedy.endswith("admin, tenant, viewer")
    with pytest.raises(PermissionDenied):
        roles.authorize(name, Permission.VIEW, "job.x")


def test_roles_of_the_configuration_reach_their_own_jobs_unless_they_say_otherwise() -> None:
    assert TENANT.scope is Scope.OWN


@pytest.mark.parametrize("role", BUILT_IN)
def test_built_in_roles_cannot_be_redefined(role: Role) -> None:
    assert role_name_fault(role.name)
    weaker = Role(name=role.name, permissions=frozenset(Permission), scope=Scope.ALL)
    assert Roles.with_own(weaker).find(role.name) == role


@pytest.mark.parametrize("name", [*NO_ROLES, "1a", "a b", "x" * 65])
def test_names_that_could_be_taken_for_others_are_no_roles(name: str) -> None:
    if name in ("viewers", "root"):
        assert role_name_fault(name) is None
    else:
        assert role_name_fault(name)


def test_role_is_within_another_that_may_do_as_much_upon_as_many_jobs() -> None:
    view, more = frozenset({Permission.VIEW}), frozenset({Permission.VIEW, Permission.LOG})
    roles = {
        (permissions, scope): Role(name="x", permissions=permissions, scope=scope)
        for permissions in (view, more)
        for scope in Scope
    }
    for (permissions, scope), role in roles.items():
        for (others, wider), other in roles.items():
            within = permissions <= others and (scope is Scope.OWN or wider is Scope.ALL)
            assert role.is_within(other) is within


def test_remedy_names_no_role_that_cannot_use_what_all_share() -> None:
    own = Role(name="builder", permissions=frozenset({Permission.VOLUMES}), scope=Scope.OWN)
    with pytest.raises(PermissionDenied) as caught:
        Roles.with_own(own).authorize("viewer", Permission.VOLUMES, "volume.list")
    assert "builder" not in caught.value.remedy
