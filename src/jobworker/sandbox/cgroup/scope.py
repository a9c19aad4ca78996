"""A job's scope: its limits, its usage and its end, as far as cgroup v1 and v2 have them in common.

The life of a scope:

    create() -> attach_self() in the child, or clone into clone_fd -> arm() -> usage() …
             -> kill() -> (reap) -> remove()

create(), attach_self(), clone3(2), kill() and remove() wait for the kernel's locks on control
groups. While mkdir(2) or rmdir(2) waits for them, it holds the lock of the tree's directory, so the
lookup of a scope by its name there waits too. A process that must not wait, such as the launcher,
therefore leaves these calls to another one. It uses a scope by `adopt()`, with descriptors of the
scope's own directories: only the removal of the scope locks these.

The kernel's counters run from the creation of the scope. A spare waits in its scope before it
becomes a job. So arm() stores the counters as a baseline, and usage() returns the difference. If
the next job's limits can be guessed, arm_ahead() sets them in advance, so that arm() is fast.

What must hold: no limit is left out silently, so arm() raises if it cannot set one; after remove()
no directory is left in any hierarchy.
"""

import contextlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence

from jobworker import errors
from jobworker.sandbox.cgroup import cpuset as cgroup_cpuset
from jobworker.sandbox.cgroup import files
from jobworker.sandbox.cgroup.accounting import ScopeLimits, ScopeUsage
from jobworker.sandbox.cgroup.directories import TreeDirectories


class JobScope(ABC):
    """One job's control group. `Tree.create()` makes it; `Tree.adopt()` refers to an existing one.

    `clone_fd`: its directory on cgroup2, for CLONE_INTO_CGROUP; None on a host without cgroup2.
    `oom_fd`: readable when the kernel may soon kill a process for want of memory. Read oom_kills()
    then, and again a little later (`cgroup.v1`). None if the group needs no event (v2).
    """

    def __init__(self, tree: TreeDirectories, name: str, directories: Sequence[int] = ()) -> None:
        self.name = name
        self.clone_fd: int | None = None
        self.oom_fd: int | None = None
        self.directories = list(directories)
        """Descriptors of its directories, in the order of the tree's `tops`; empty if the scope is
        reached by its name."""
        self._path = "." if directories else name
        places = dict(zip(tree.tops, directories, strict=True)) if directories else {}
        self._tops = {name: places.get(top, top) for name, top in tree.by_controller.items()}
        self._unified = places.get(tree.unified or -1, tree.unified)
        self._tree = tree
        self._baseline = ScopeUsage()
        self._ahead: ScopeLimits | None = None
        self._cores = ""
        self._memory_limit_bytes = 0
        self._own_ooms = self._oom_events = 0
        self._removed = False

    def attach_self(self, *, cloned: bool = True) -> None:
        """Move the calling process, which is the child, into the scope.

        `cloned`: the child was made with CLONE_INTO_CGROUP on `clone_fd`, so only the v1
        hierarchies are left. After a pause in such writes, the first one waits for an RCU grace
        period, 8 to 12 ms. Raises OSError.
        """
        for top in self._tree.tops:
            if not (cloned and top == self._tree.unified):
                files.write(top, f"{self.name}/cgroup.procs", "0")

    def arm_ahead(self, limits: ScopeLimits) -> None:
        """Set the limits of a spare in advance, so that a later arm() with the same is fast.

        Ignores a SandboxError: a later arm() meets the same fault and raises it.
        """
        with contextlib.suppress(errors.SandboxError):
            self.arm(limits)
            self._ahead = limits

    def arm(self, limits: ScopeLimits) -> None:
        """Set all limits and begin to count the usage. To be called before the program runs.

        Raises `SandboxError` with the file, the value and the kernel's reason. The caller then has
        to remove the scope, since some limits may be set and others not.
        """
        ahead, self._ahead = self._ahead, None
        if limits == ahead:
            return
        self._tree.check_controllers(limits)
        try:
            self._baseline, self._own_ooms = self._counters(), self._own_oom_count()
            self._memory_limit_bytes = limits.memory_bytes
            self._write_limits(limits)
            if limits.cores != self._cores:
                there, top = self._tree.cores(), self._tops["cpuset"]
                v2 = self._tree.kind == "v2"
                cgroup_cpuset.limit_cores(top, self._path, limits.cores, there, v2=v2)
                self._cores = limits.cores
            self._restart_peak()
        except OSError as error:
            raise errors.SandboxError(
                f"cannot set the limits of scope {self.name}: {error}", data={"step": "limits"}
            ) from error

    def usage(self) -> ScopeUsage:
        """What the job has used since arm(). Raises OSError once the scope is removed."""
        now, then = self._counters(), self._baseline
        return now._replace(
            cpu_ns=max(0, now.cpu_ns - then.cpu_ns),
            read_bytes=max(0, now.read_bytes - then.read_bytes),
            write_bytes=max(0, now.write_bytes - then.write_bytes),
            throttled_ns=max(0, now.throttled_ns - then.throttled_ns),
            oom_kills=max(0, now.oom_kills - then.oom_kills),
        )

    def oom_kills(self) -> int:
        """How often the kernel has killed for want of memory since arm().

        On v1 each kill is of one process, on v2 of the whole job.
        """
        return max(0, self._oom_count() - self._baseline.oom_kills)

    def is_over_limit(self) -> bool:
        """Whether an OOM since arm() was for the job's own memory limit. Clears `oom_fd`.

        Otherwise a kill was for want of memory in a group above or on the host.
        """
        return bool(self._memory_limit_bytes) and self._own_oom_count() > self._own_ooms

    def sockets_beyond_limit(self) -> int:
        """The bytes in socket buffers beyond their limit; 0 if the group does not count them apart.

        The kernel lets each TCP socket exceed the limit by a piece or two.
        """
        return 0

    def sockets_counted(self) -> tuple[int, int]:
        """The bytes in sockets that the job's group counts.

        Returns the maximum since the last call, and the present value. If the kernel does not show
        them, both are the memory limit, or `sys.maxsize` for a job without one.
        """
        return self.sockets_limit_bytes, self.sockets_limit_bytes

    @property
    def sockets_limit_bytes(self) -> int:
        """The most that the group may count in sockets, without `sockets_beyond_limit` (bytes)."""
        return self._memory_limit_bytes or sys.maxsize

    def clear_oom(self) -> None:
        """Read and count the events of `oom_fd`, so that it is not readable until the next one."""
        if self.oom_fd is not None:
            with contextlib.suppress(BlockingIOError):
                self._oom_events += os.eventfd_read(self.oom_fd)

    def kill(self) -> None:
        """Send SIGKILL to all processes in the scope. Their parents still have to reap them.

        A process in delayed direct I/O cannot die before the I/O is done, which may take minutes.
        So the I/O limit is lifted first. Raises OSError.
        """
        if self._removed:
            return
        if "io" in self._tree.by_controller:
            with contextlib.suppress(OSError, errors.SandboxError):
                self._lift_io_limit()
        if self._tree.unified is not None and self._tree.kills_groups:
            files.write(self._tree.unified, f"{self.name}/cgroup.kill", "1")
            return
        self._forbid_forks()
        for top in self._tree.tops:
            files.kill_members(top, self.name)

    def remove(self) -> None:
        """Remove the scope from every hierarchy and close its descriptors. Idempotent.

        Raises OSError (EBUSY) while a process is in it; the caller tries again later.
        """
        if self._removed:
            return
        for top in self._tree.tops:
            files.remove_group(top, self.name)
        self._removed = True
        self._tree.forget(self.name)
        self.close()

    def close(self) -> None:
        """Close its descriptors, if another process removes the scope. Idempotent.

        The caller removes `oom_fd` from epoll before: a forked child may hold a copy of it, which
        would keep the registration alive.
        """
        self._removed = True
        for descriptor in self._descriptors():
            os.close(descriptor)
        self.clone_fd = self.oom_fd = None
        self.directories = []

    def _descriptors(self) -> list[int]:
        """The descriptors that this scope owns."""
        own = [each for each in (self.clone_fd, self.oom_fd) if each is not None]
        return [*own, *self.directories]

    def open(self) -> None:
        """Open `clone_fd` and `oom_fd` of a scope that was just made. Raises OSError."""
        if self._tree.unified is not None:
            self.clone_fd = os.open(self.name, files.DIRECTORY, dir_fd=self._tree.unified)

    @abstractmethod
    def _write_limits(self, limits: ScopeLimits) -> None: ...

    @abstractmethod
    def _lift_io_limit(self) -> None: ...

    @abstractmethod
    def _counters(self) -> ScopeUsage:
        """The present values of the kernel's counters, from the creation of the scope."""

    @abstractmethod
    def _oom_count(self) -> int: ...

    @abstractmethod
    def _own_oom_count(self) -> int:
        """A counter of OOMs for this group's own limit. Only its growth has a meaning."""

    @abstractmethod
    def _restart_peak(self) -> None:
        """Reset the memory peak to the present usage, if the kernel can do that."""

    def _forbid_forks(self) -> None:
        if "pids" in self._tree.by_controller:
            files.write(self._tree.by_controller["pids"], f"{self.name}/pids.max", "0")
