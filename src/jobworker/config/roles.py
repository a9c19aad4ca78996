"""The roles of the configuration: `[roles.NAME]` tables, and the table that they make.

`admin` and `viewer` are always there (`model.access`); a configuration adds to them.
"""

from collections.abc import Mapping

from attrs import field, frozen

from jobworker.model.access import Permission, Quota, Role, Roles, Scope, role_name_fault
from jobworker.model.bounds import within
from jobworker.model.units import MEBIBYTE


@frozen(kw_only=True)
class RoleSettings:
    """What the bearers of a role may do, upon whose jobs, and how much each name at once."""

    operations: tuple[Permission, ...]
    scope: Scope = Scope.OWN
    max_jobs: int = field(default=0, validator=within(0, 1_000_000))
    max_cpu: int = field(default=0, validator=within(0, 1 << 40))
    max_memory: int = field(default=0, validator=within(0, 1 << 40))
    max_output: int = field(default=0, validator=within(0, 1 << 40))

    @property
    def quota(self) -> Quota:
        """The bounds in their own units."""
        return Quota(
            jobs=self.max_jobs,
            cpu_percent=self.max_cpu,
            memory_bytes=self.max_memory * MEBIBYTE,
            output_bytes=self.max_output * MEBIBYTE,
        )


def check_names(_: object, __: object, value: Mapping[str, RoleSettings]) -> None:
    """An attrs validator: raises ValueError for names that no role may have."""
    faults = [fault for name in value if (fault := role_name_fault(name))]
    if faults:
        raise ValueError("; ".join(faults))


def role_table(settings: Mapping[str, RoleSettings]) -> Roles:
    """The built-in roles and these."""
    return Roles.with_own(
        *(
            Role(
                name=name,
                permissions=frozenset(role.operations),
                scope=role.scope,
                quota=role.quota,
            )
            for name, role in settings.items()
        )
    )
