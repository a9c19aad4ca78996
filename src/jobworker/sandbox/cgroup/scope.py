"""A job's scope and the tree of scopes, as far as cgroup v1 and v2 agree.

A tree has a directory of its own in one hierarchy (v2) or in several (v1, hybrid); a scope is a
directory of the same name in each of them. The life of a scope:

    create() -> attach_self() in the child, or clone into clone_fd -> arm() -> usage() …
             -> kill() -> (reap) -> remove()

create(), attach_self(), clone3(2), kill() and remove() wait for the kernel's one lock on groups.
Meanwhile mkdir(2) and rmdir(2) have our directory locked, in which a scope would be looked up. So a
process that must not wait leaves these to another one. It has a scope by `adopt()`: by descriptors
of its own directories, below which only its own removal locks anything.

Counters of the kernel run from the scope's creation. A spare waits in its scope before a job
takes it, so arm() notes a baseline and usage() is the difference. Where the limits to come can be
guessed, arm_ahead() sets them while nobody waits, and arm() has nothing left to do.

What must hold: no limit is left out silently (arm() refuses what it cannot set); after remove()
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
"""What processes of a job were killed for want of: nothing; memory within the job's own limit;
memory of the host or of a group above; the kernel's own memory
(`sandbox.launcher.kernel_watch`)."""
SWEEP_SECONDS = 5.0
SWEEP_PAUSE_SECONDS = 0.005


_CONTROLLERS = ("cpu", "memory", "io", "pids", "cpuset")
"""Those of `Limits`, in its order."""


class Limits(NamedTuple):
    """What a job may use; 0 is no limit. The caller has validated the ranges."""

    cpu_percent: int = 0  # of one core: 200 is two cores
    memory_bytes: int = 0  # hard, swap included
    io_bps: int = 0  # bytes a second, reads and writes each, on every whole block device
    pids: int = 0  # processes and threads
    cores: str = ""  # the cores to run on, such as "0-3,5"; "" is all


class Usage(NamedTuple):
    """What a job has used since arm(); 0 where its controller is not in use."""

    cpu_ns: int = 0
    memory_bytes: int = 0  # now
    memory_peak_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    pids: int = 0  # now
    throttled_ns: int = 0  # waiting for the CPU limit's next period, all cores together
    oom_kills: int = 0


class Scope(ABC):
    """One job's control group, made by `Tree.create()`, or known by `Tree.adopt()`.

    `clone_fd`: its directory on cgroup2, for CLONE_INTO_CGROUP; None on a host without.
    `oom_fd`: readable when the kernel may be about to kill for want of memory (v1: look at
    oom_kills() then and again a little later, see cgroup_v1); None where no event is needed.
    """

    def __init__(self, tree: "Tree", name: str, directories: Sequence[int] = ()) -> None:
        self.name = name
        self.clone_fd: int | None = None
        self.oom_fd: int | None = None
        self.directories = list(directories)
        """Its own, in the order of the tree's `tops`; empty where it is reached by its name."""
        self._path = "." if directories else name
        places = dict(zip(tree.tops, directories, strict=True)) if directories else {}
        self._tops = {name: places.get(top, top) for name, top in tree.by_controller.items()}
        self._unified = places.get(tree.unified or -1, tree.unified)
        self._tree = tree
        self._baseline = Usage()
        self._ahead: Limits | None = None
        self._cores = ""
        self._memory_limit_bytes = 0
        self._own_ooms = self._oom_events = 0
        self._removed = False

    def attach_self(self, *, cloned: bool = True) -> None:
        """Put the calling process into the scope: to be called in the child.

        `cloned`: the child was made with CLONE_INTO_CGROUP on `clone_fd`, so that only the v1
        hierarchies are left. The first write after a while waits for an RCU grace period,
        8 to 12 ms. Raises OSError.
        """
        for top in self._tree.tops:
            if not (cloned and top == self._tree.unified):
                files.write(top, f"{self.name}/cgroup.procs", "0")

    def arm_ahead(self, limits: Limits) -> None:
        """Do what arm() would for these limits, for a child that has nothing to do until then.

        Where it fails, arm() finds the same fault and tells of it.
        """
        with contextlib.suppress(errors.SandboxError):
            self.arm(limits)
            self._ahead = limits

    def arm(self, limits: Limits) -> None:
        """Set all limits and start counting from here; to be called before the job.

        Raises `SandboxError` with the file, the value and the kernel's reason; the scope is
        then to be removed, since some limits may be set and others not.
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

    def usage(self) -> Usage:
        """What was used since arm(); raises OSError once the scope is removed."""
        now, then = self._counters(), self._baseline
        return now._replace(
            cpu_ns=max(0, now.cpu_ns - then.cpu_ns),
            read_bytes=max(0, now.read_bytes - then.read_bytes),
            write_bytes=max(0, now.write_bytes - then.write_bytes),
            throttled_ns=max(0, now.throttled_ns - then.throttled_ns),
            oom_kills=max(0, now.oom_kills - then.oom_kills),
        )

    def oom_kills(self) -> int:
        """The kernel's kills for want of memory since arm(): v1 one process each, v2 the job."""
        return max(0, self._oom_count() - self._baseline.oom_kills)

    def is_over_limit(self) -> bool:
        """Whether the job's own memory limit was reached since arm(), and no memory was found.

        Else a kill was for want of memory in a group above, or on the host. Clears `oom_fd`.
        """
        return bool(self._memory_limit_bytes) and self._own_oom_count() > self._own_ooms

    def sockets_beyond_limit(self) -> int:
        """Bytes in buffers of sockets beyond the memory limit, where they are counted apart.

        The kernel grants each socket of a connection a piece or two whatever the limit is.
        """
        return 0

    def sockets_counted(self) -> tuple[int, int]:
        """Bytes that the job's group counts in its sockets: at most since the last call, and now.

        Where that is not told, it is taken to be the memory limit. A job without one may hold what
        it likes.
        """
        return self.sockets_limit_bytes, self.sockets_limit_bytes

    @property
    def sockets_limit_bytes(self) -> int:
        """What the job's group counts in its sockets at most, but for `sockets_beyond_limit`."""
        return self._memory_limit_bytes or sys.maxsize

    def clear_oom(self) -> None:
        """Take what `oom_fd` has to say, so that it is not readable until the next time."""
        if self.oom_fd is not None:
            with contextlib.suppress(BlockingIOError):
                self._oom_events += os.eventfd_read(self.oom_fd)

    def kill(self) -> None:
        """SIGKILL everything in the scope; the dead are still to be reaped. Raises OSError.

        A process that waits for delayed direct I/O cannot die before that is through, which may
        take minutes; so the I/O limit is lifted first.
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
        """Remove the scope from every hierarchy and close its descriptors; idempotent.

        Raises OSError (EBUSY) while a process is left; call it again then.
        """
        if self._removed:
            return
        for top in self._tree.tops:
            files.remove_group(top, self.name)
        self._removed = True
        self._tree.forget(self.name)
        self.close()

    def close(self) -> None:
        """Close its descriptors: another process removes it, or has done so; idempotent.

        Take `oom_fd` out of epoll before: a forked child may still hold a copy, which keeps the
        registration alive.
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
    def _write_limits(self, limits: Limits) -> None: ...

    @abstractmethod
    def _lift_io_limit(self) -> None: ...

    @abstractmethod
    def _counters(self) -> Usage:
        """The kernel's counters as they stand."""

    @abstractmethod
    def _oom_count(self) -> int: ...

    @abstractmethod
    def _own_oom_count(self) -> int:
        """How often this group's own limit left no memory; only its growth says anything."""

    @abstractmethod
    def _restart_peak(self) -> None:
        """Let the peak of memory start from the present usage, where the kernel can."""

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
        """What tells the cores that there are: looked up once, for our directory may be locked."""

    def check_controllers(self, limits: Limits) -> None:
        """Raise `SandboxError` if a limit is asked for whose controller is not in use."""
        for controller, value in zip(_CONTROLLERS, limits, strict=True):
            if value and controller not in self.by_controller:
                raise errors.SandboxError(
                    f"cannot limit {controller}: the controller is not in use",
                    remedy=_remedy(controller),
                    data={"step": "limits"},
                )

    def cores(self) -> str:
        """The cores that our directory has, where there is a cpuset. Raises OSError."""
        if self._cores_fd is None:
            file = cgroup_cpuset.EFFECTIVE[self.kind == "v2"]
            flags = os.O_RDONLY | os.O_CLOEXEC
            self._cores_fd = os.open(file, flags, dir_fd=self.by_controller["cpuset"])
        return os.pread(self._cores_fd, 65536, 0).decode("ascii", "replace").strip()

    def adopt(self, name: str, directories: Sequence[int] = (), oom_fd: int | None = None) -> Scope:
        """The scope of that name, which another process has made: see `open_directories`.

        It owns the descriptors. Without any it serves to be killed and removed by its name.
        """
        scope = self._new_scope(name, directories)
        scope.oom_fd = oom_fd
        return scope

    def open_directories(self, name: str) -> list[int]:
        """A descriptor of each directory of a scope, for `adopt`. Raises OSError."""
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
        """Let the scopes have no more processes and threads together, where these are counted.

        Raises `SandboxError`.
        """
        if "pids" in self.by_controller:
            top, value = self.by_controller["pids"], str(most)
            files.set_limit(top, "pids.max", value, value.__eq__)

    def create(self, scope_name: str) -> Scope:
        """Make an empty scope without limits; raises `SandboxError`, and leaves nothing then."""
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
        """A scope has removed itself."""
        self._scopes.discard(scope_name)

    def sweep(self) -> list[str]:
        """Kill and remove the scopes that an earlier instance of this name left behind.

        Returns their names. Waits for the killed to die, up to `SWEEP_SECONDS` in all, which is
        why it belongs to the start. Raises OSError when something cannot be removed.
        """
        left = {name for top in self.tops for name in files.subgroups(top)} - self._scopes
        deadline = time.monotonic() + SWEEP_SECONDS
        for name in sorted(left):
            self._sweep_one(name, deadline)
        return sorted(left)

    def close(self) -> None:
        """Remove our own directories and close all descriptors; idempotent.

        Raises OSError (EBUSY, ENOTEMPTY) while a scope is left; call it again then.
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
        """What this host cannot do as the limits mean it: a line each for `worker check`."""

    @abstractmethod
    def _new_scope(self, name: str, directories: Sequence[int] = ()) -> Scope: ...

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
            "mount or delegate the cpuset controller, or choose no cores (of worker-cli: "
            "--cpu-cores)"
        )
    return f"add {controller} to cgroup.enable_controllers"
