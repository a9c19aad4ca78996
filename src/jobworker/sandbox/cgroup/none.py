"""No control groups at all: for a user who may make none, and whose configuration asks for none.

A scope is nothing here. Every limit is refused by name (`Scope.arm`), nothing is measured, and a
job ends with its process namespace, which a group would only have helped to catch.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jobworker.sandbox.cgroup.scope import Kind, Limits, Scope, Tree, Usage


class NoScope(Scope):
    """The scope of a job that is in no group of ours."""

    def _write_limits(self, limits: Limits) -> None:
        assert not any(limits)  # `arm` has refused what no controller can keep

    def _lift_io_limit(self) -> None:
        pass

    def _counters(self) -> Usage:
        return Usage()

    def _oom_count(self) -> int:
        return 0

    def _own_oom_count(self) -> int:
        return 0

    def _restart_peak(self) -> None:
        pass


class NoTree(Tree):
    """The tree that makes no directory anywhere; `why` there is none.

    `left` are open directories of an earlier instance, by their paths: to be swept and closed.
    """

    kind: Kind = "none"

    def __init__(self, name: str, why: str, left: Mapping[str, int] = MappingProxyType({})) -> None:
        super().__init__(name, dict(left), None)
        self._why = why

    def missing_features(self) -> tuple[str, ...]:
        return (f"no limit is enforced and no usage is measured: {self._why}",)

    def _new_scope(self, name: str, directories: Sequence[int] = ()) -> NoScope:
        return NoScope(self, name, directories)
