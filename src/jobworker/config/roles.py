"""The tables `[roles.NAME]` of the configuration, and the table of roles made of them.

The roles `admin` and `viewer` always exist (`model.access`); a configuration adds others.
"""

from collections.abc import Mapping

from attrs import field, frozen

from jobworker.model.access import Permission, Quota, Role, Roles, Scope, role_name_fault
from jobworker.model.bounds import within
from jobworker.model.units import MEBIBYTE


@frozen(kw_only=True)
class RoleSettings:
    """The permissions of a role, the jobs that it reaches, and the quota of each name."""

    operations: tuple[Permission, ...]
    scope: Scope = Scope.OWN
    max_jobs: int = field(default=0, validator=within(0, 1_000_000))
    max_cpu: int = field(default=0, validator=within(0, 1 << 40))
    max_memory: int = field(default=0, validator=within(0, 1 << 40))
    max_output: int = field(default=0, validator=within(0, 1 << 40))

    @property
    def quota(self) -> Quota:
        """The quota, with sizes converted from MiB to bytes."""
        return Quota(
            jobs=self.max_jobs,
            cpu_percent=self.max_cpu,
            memory_bytes=self.max_memory * MEBIBYTE,
            output_bytes=self.max_output * MEBIBYTE,
        )


def check_names(_: object, __: object, value: Mapping[str, RoleSettings]) -> None:
    """A validator of attrs: raises ValueError for names that no role may have."""
    faults = [fault for name in value if (fault := role_name_fault(name))]
    if faults:
        raise ValueError("; ".join(faults))


def role_table(settings: Mapping[str, RoleSettings]) -> Roles:
    """Make the table of the built-in roles and those of `settings`."""
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
