"""The instance's own directory in each hierarchy, in which the scopes stand.

A tree has a directory of its own in one hierarchy (v2) or in several (v1, hybrid). A scope is a
directory of the same name in each of them: `cgroup.scope`, and `cgroup.tree` for all of them.

Standard library only.
"""

import os
from typing import Literal

from jobworker import errors
from jobworker.sandbox.cgroup import cpuset as cgroup_cpuset
from jobworker.sandbox.cgroup import files
from jobworker.sandbox.cgroup.accounting import ScopeLimits

Kind = Literal["v1", "hybrid", "v2", "none"]
_CONTROLLERS = ("cpu", "memory", "io", "pids", "cpuset")
"""The controller of each field of `ScopeLimits`, in the same order."""


class TreeDirectories:
    """This instance's own directory in each hierarchy.

    `tops` are the open directories, each once; `unified` is the one on cgroup2, if any.
    """

    kind: Kind

    def __init__(self, name: str, by_controller: dict[str, int], unified: int | None) -> None:
        self.name = name
        self.unified = unified
        self.by_controller = by_controller
        carriers = [*by_controller.values(), *([] if unified is None else [unified])]
        self.tops = tuple(dict.fromkeys(carriers))
        self.kills_groups = unified is not None and files.exists(unified, "cgroup.kill")
        self._scopes: set[str] = set()
        self._closed = False
        self._cores_fd: int | None = None
        """The open file that lists the cores of our directory. It is opened once, since a lookup in
        the directory may wait for a lock."""

    def check_controllers(self, limits: ScopeLimits) -> None:
        """Raise `SandboxError` if a limit is asked for whose controller is not in use."""
        for controller, value in zip(_CONTROLLERS, limits, strict=True):
            if value and controller not in self.by_controller:
                raise errors.SandboxError(
                    f"cannot limit {controller}: the controller is not in use",
                    remedy=_remedy(controller),
                    data={"step": "limits"},
                )

    def cores(self) -> str:
        """The cores of our directory, such as "0-3", by its cpuset. Raises OSError."""
        if self._cores_fd is None:
            file = cgroup_cpuset.EFFECTIVE[self.kind == "v2"]
            flags = os.O_RDONLY | os.O_CLOEXEC
            self._cores_fd = os.open(file, flags, dir_fd=self.by_controller["cpuset"])
        return os.pread(self._cores_fd, 65536, 0).decode("ascii", "replace").strip()

    def open_directories(self, name: str) -> list[int]:
        """A descriptor of each directory of a scope, in the order of `tops`. Raises OSError."""
        opened: list[int] = []
        try:
            for top in self.tops:
                opened.append(os.open(name, files.DIRECTORY, dir_fd=top))  # noqa: PERF401 - undone
        except OSError:
            for descriptor in opened:
                os.close(descriptor)
            raise
        return opened

    def bound_processes(self, most: int) -> None:
        """Limit all scopes together to `most` processes and threads. Raises `SandboxError`.

        Does nothing if the pids controller is not in use.
        """
        if "pids" in self.by_controller:
            top, value = self.by_controller["pids"], str(most)
            files.set_limit(top, "pids.max", value, value.__eq__)

    def forget(self, scope_name: str) -> None:
        """Drop a scope from the tree. A scope calls this when it has removed itself."""
        self._scopes.discard(scope_name)

    def close(self) -> None:
        """Remove our own directories and close all descriptors. Idempotent.

        Raises OSError (EBUSY, ENOTEMPTY) while a scope is left; the caller tries again later.
        """
        if self._closed:
            return
        for top in self.tops:
            try:
                os.rmdir(f"../{self.name}", dir_fd=top)
            except FileNotFoundError:
                continue
        self._closed = True
        for top in self.tops:
            os.close(top)
        if self._cores_fd is not None:
            os.close(self._cores_fd)


def _remedy(controller: str) -> str:
    if controller == "cpuset":
        return (
            "mount or delegate the cpuset controller, or start the job without a choice of cores "
            "(worker-cli: --cpu-cores)"
        )
    return f"add {controller} to cgroup.enable_controllers"
