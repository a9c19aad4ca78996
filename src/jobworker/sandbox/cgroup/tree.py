"""The tree of scopes: makes them, refers to those of another process, and removes old ones.

create() and sweep() wait for the kernel's locks on control groups, as `cgroup.scope` describes.

Standard library only.
"""

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from jobworker import errors
from jobworker.sandbox.cgroup import files
from jobworker.sandbox.cgroup.directories import TreeDirectories
from jobworker.sandbox.cgroup.scope import JobScope

SWEEP_SECONDS = 5.0
SWEEP_PAUSE_SECONDS = 0.005


class Tree(TreeDirectories, ABC):
    """The scopes in this instance's own directories."""

    def adopt(
        self, name: str, directories: Sequence[int] = (), oom_fd: int | None = None
    ) -> JobScope:
        """A scope that another process has made.

        `directories` are as from `open_directories`. The scope owns them and `oom_fd`. Without
        directories it can only be killed and removed, by its name.
        """
        scope = self._new_scope(name, directories)
        scope.oom_fd = oom_fd
        return scope

    def create(self, scope_name: str) -> JobScope:
        """Make an empty scope without limits. Raises `SandboxError`; nothing is left then."""
        if not scope_name or "/" in scope_name or scope_name.startswith("."):
            raise ValueError(f"not a name for a scope: {scope_name!r}")
        made: list[int] = []
        try:
            for top in self.tops:
                os.mkdir(scope_name, 0o755, dir_fd=top)
                made.append(top)
            scope = self._new_scope(scope_name)
            try:
                scope.open()
            except OSError:
                scope.close()
                raise
        except OSError as error:
            for top in made:
                os.rmdir(scope_name, dir_fd=top)
            raise errors.SandboxError(
                f"cannot make scope {scope_name}: {error}", data={"step": "scope"}
            ) from error
        self._scopes.add(scope_name)
        return scope

    def sweep(self) -> list[str]:
        """Kill and remove the scopes that an earlier instance of this name left behind.

        Returns their names. Waits up to `SWEEP_SECONDS` in all until the killed processes are dead;
        so only the start may call it. Raises OSError if a scope cannot be removed.
        """
        left = {name for top in self.tops for name in files.subgroups(top)} - self._scopes
        deadline = time.monotonic() + SWEEP_SECONDS
        for name in sorted(left):
            self._sweep_one(name, deadline)
        return sorted(left)

    @abstractmethod
    def missing_features(self) -> tuple[str, ...]:
        """A line for each limit or counter that this host cannot fully offer (`worker check`)."""

    @abstractmethod
    def _new_scope(self, name: str, directories: Sequence[int] = ()) -> JobScope: ...

    def _sweep_one(self, name: str, deadline: float) -> None:
        while True:
            if self.unified is not None and self.kills_groups:
                with contextlib.suppress(OSError):
                    files.write(self.unified, f"{name}/cgroup.kill", "1")
            for top in self.tops:
                files.kill_members(top, name)
            try:
                for top in self.tops:
                    files.remove_group(top, name)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(SWEEP_PAUSE_SECONDS)
            else:
                return
