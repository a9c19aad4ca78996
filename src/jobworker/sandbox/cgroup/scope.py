"""A job's scope and the tree of scopes: the code that cgroup v1 and v2 have in common.

A tree has a directory of its own in one hierarchy (v2) or in several (v1, hybrid). A scope is a
directory of the same name in each of them. The life of a scope:

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
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jobworker import errors
from jobworker.sandbox.cgroup import cpuset as cgroup_cpuset
from jobworker.sandbox.cgroup import files

Kind = Literal["v1", "hybrid", "v2", "none"]
Want = Literal["", "limit", "host", "kernel"]
"""Which memory was missing when processes of a job were killed. "": no process was killed.
"limit": memory within the job's own limit. "host": memory of the host or of a group above.
"kernel": memory of the kernel (`sandbox.launcher.kernel_watch`)."""
SWEEP_SECONDS = 5.0
SWEEP_PAUSE_SECONDS = 0.005


_CONTROLLERS = ("cpu", "memory", "io", "pids", "cpuset")
"""The controller of each field of `ScopeLimits`, in the same order."""


class ScopeLimits(NamedTuple):
    """The limits of a job; 0 is no limit. The caller has to validate the ranges."""

    cpu_percent: int = 0  # of one core: 200 is two cores
    memory_bytes: int = 0  # hard, swap included
    io_bps: int = 0  # bytes a second, reads and writes each, on every whole block device
    pids: int = 0  # processes and threads
    cores: str = ""  # the cores to run on, such as "0-3,5"; "" is all


class ScopeUsage(NamedTuple):
    """What a job has used since arm(). A field is 0 if its controller is not in use."""

    cpu_ns: int = 0
    memory_bytes: int = 0  # now
    memory_peak_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    pids: int = 0  # now
    throttled_ns: int = 0  # waiting for the CPU limit's next period, all cores together
    oom_kills: int = 0


class JobScope(ABC):
    """One job's control group. `Tree.create()` makes it; `Tree.adopt()` refers to an existing one.

    `clone_fd`: its directory on cgroup2, for CLONE_INTO_CGROUP; None on a host without cgroup2.
    `oom_fd`: readable when the kernel may soon kill a process for want of memory. Read oom_kills()
    then, and again a little later (`cgroup.v1`). None if the group needs no event (v2).
    """

    def __init__(self, tree: "Tree", name: str, directories: Sequence[int] = ()) -> None:
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


class Tree(ABC):
    """This instance's own directory in each hierarchy, and the scopes in it.

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

    def forget(self, scope_name: str) -> None:
        """Drop a scope from the tree. A scope calls this when it has removed itself."""
        self._scopes.discard(scope_name)

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


def _remedy(controller: str) -> str:
    if controller == "cpuset":
        return (
            "mount or delegate the cpuset controller, or start the job without a choice of cores "
            "(worker-cli: --cpu-cores)"
        )
    return f"add {controller} to cgroup.enable_controllers"
