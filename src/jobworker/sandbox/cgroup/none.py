"""The backend without control groups, for a user who may make none and asks for no limits.

A scope has no directory here. `JobScope.arm` refuses every limit by its name, and no usage is
measured. A kill of a job's first process still ends the job, since the kernel then kills all of its
PID namespace.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jobworker.sandbox.cgroup.accounting import ScopeLimits, ScopeUsage
from jobworker.sandbox.cgroup.directories import Kind
from jobworker.sandbox.cgroup.scope import JobScope
from jobworker.sandbox.cgroup.tree import Tree


class NoScope(JobScope):
    """The scope of a job without a control group."""

    def _write_limits(self, limits: ScopeLimits) -> None:
        assert not any(limits)  # `arm` has refused what no controller can keep

    def _lift_io_limit(self) -> None:
        pass

    def _counters(self) -> ScopeUsage:
        return ScopeUsage()

    def _oom_count(self) -> int:
        return 0

    def _own_oom_count(self) -> int:
        return 0

    def _restart_peak(self) -> None:
        pass


class NoTree(Tree):
    """A tree that makes no directory.

    `why`: the reason for that, for `missing_features`. `left`: open directories of an earlier
    instance, by their paths, for `sweep` and `close`.
    """

    kind: Kind = "none"

    def __init__(self, name: str, why: str, left: Mapping[str, int] = MappingProxyType({})) -> None:
        super().__init__(name, dict(left), None)
        self._why = why

    def missing_features(self) -> tuple[str, ...]:
        return (f"no limit is enforced and no usage is measured: {self._why}",)

    def _new_scope(self, name: str, directories: Sequence[int] = ()) -> NoScope:
        return NoScope(self, name, directories)
