"""Probes of control groups: a real limit of each controller, and the features that jobs need.

Each probe makes a tree of its own, as the launcher does, and removes it again.

Standard library only.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from jobworker.errors import JobworkerError
from jobworker.model.units import MEBIBYTE
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.cgroup.hierarchy import JobScope, ScopeLimits, Tree, open_tree
from jobworker.sandbox.cgroup.mounts import CONTROLLERS
from jobworker.sandbox.check.probing import SECONDS, Missing, Probe

_LIMITS = {
    "cpu": ScopeLimits(cpu_percent=50),
    "memory": ScopeLimits(memory_bytes=64 * MEBIBYTE),
    "io": ScopeLimits(io_bps=MEBIBYTE),
    "pids": ScopeLimits(pids=16),
}
_FILE = {
    "v2": {"cpu": "cpu.max", "memory": "memory.max", "io": "io.max", "pids": "pids.max"},
    "v1": {
        "cpu": "cpu.cfs_quota_us",
        "memory": "memory.limit_in_bytes",
        "io": "blkio.throttle",
        "pids": "pids.max",
    },
}


def probes(enabled: Sequence[str], parent: str) -> Iterable[Probe]:
    """The probes of this module. The `enabled` controllers are needed, the others are optional.

    `parent` is the control group below which the launcher makes its own (cgroup.parent).
    """
    on = partial(_with_tree, tuple(enabled), parent)
    for controller in CONTROLLERS:
        limited = partial(_with_tree, (controller,), parent, partial(_limited, controller))
        yield Probe("limits", f"{controller} limit", limited, "", controller in enabled)
    if not enabled:
        return
    yield Probe("limits", "all of them together", partial(on, _kind), "")
    v2 = "mount cgroup2 and use Linux 5.14 or newer"
    yield Probe("limits", "born in the group (CLONE_INTO_CGROUP)", partial(on, _born), v2, False)
    yield Probe("limits", "end of a whole group", partial(on, _killed), v2)
    if "memory" in enabled:
        yield Probe("limits", "out of memory is noticed", partial(on, _oom), "")
        newer = "use Linux 5.19 or newer"
        yield Probe("limits", "peak memory", partial(on, _peak), newer, False)
    if "io" in enabled:
        whole = "boot with systemd.unified_cgroup_hierarchy=1 (cgroup v2)"
        yield Probe("limits", "buffered writes", partial(on, _buffered), whole, False)


def name_for(pid: int) -> str:
    """The name of the control groups that a probing program with this process id makes."""
    return f"jobworker-check-{pid}"


def sweep(enabled: Sequence[str], parent: str, pid: int) -> None:
    """Remove the control groups that a killed probe left behind, if there are any."""
    for controllers in ((name,) for name in enabled or CONTROLLERS):
        with contextlib.suppress(OSError, JobworkerError):
            tree = open_tree(controllers, name_for(pid), parent)
            tree.sweep()
            tree.close()


def _with_tree(
    controllers: tuple[str, ...], parent: str, work: Callable[[Tree, JobScope], str]
) -> str:
    tree = open_tree(controllers, name_for(os.getppid()), parent)
    try:
        scope = tree.create("probe")
        try:
            return work(tree, scope)
        finally:
            tree.sweep()
            scope.remove()
    finally:
        tree.close()


def _limited(controller: str, tree: Tree, scope: JobScope) -> str:
    scope.arm(_LIMITS[controller])  # raises if a limit does not read back as it was written
    return f"{tree.kind}, {_FILE['v2' if tree.kind == 'v2' else 'v1'][controller]}"


def _kind(tree: Tree, scope: JobScope) -> str:
    scope.arm(ScopeLimits())
    return tree.kind


def _member(scope: JobScope, work: Callable[[], None]) -> tuple[int, int]:
    """Start a process in the scope that does `work` and exits: its process id and its pidfd."""
    pid, pidfd = sc.clone3(0, scope.clone_fd)
    if pid == 0:
        try:
            sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
            scope.attach_self(cloned=scope.clone_fd is not None)
            work()
        finally:
            os._exit(1)
    return pid, pidfd


def _wait(pidfd: int) -> "os.waitid_result":
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    assert ended is not None
    return ended


def _born(tree: Tree, scope: JobScope) -> str:
    if scope.clone_fd is None:
        raise Missing("no cgroup2 is mounted: children enter their groups after the clone")
    pid, pidfd = sc.clone3(0, scope.clone_fd)
    if pid == 0:
        with open("/proc/self/cgroup", encoding="ascii", errors="replace") as places:
            os._exit(0 if f"{tree.name}/{scope.name}" in places.read() else 1)
    if _wait(pidfd).si_status:
        raise Missing("the child is not in the group that it was cloned into")
    return "clone3"


def _killed(tree: Tree, scope: JobScope) -> str:
    ready, notify = os.pipe2(os.O_CLOEXEC)

    def sleep() -> None:
        os.write(notify, b"!")
        signal.pause()

    _, pidfd = _member(scope, sleep)
    os.close(notify)
    if not os.read(ready, 1):
        raise Missing("a process cannot enter the group")
    scope.kill()
    if _wait(pidfd).si_code != os.CLD_KILLED:
        raise Missing("a process of the group still runs")
    return "cgroup.kill" if tree.kills_groups else "one by one"


def _oom(tree: Tree, scope: JobScope) -> str:
    scope.arm(ScopeLimits(memory_bytes=24 * MEBIBYTE))

    def take() -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        taken = bytearray(96 * MEBIBYTE)
        taken[::page] = b"\1" * len(range(0, len(taken), page))

    _, pidfd = _member(scope, take)
    if _wait(pidfd).si_code != os.CLD_KILLED:
        raise Missing("a process that takes more memory than its limit still runs")
    signal.alarm(int(SECONDS) - 1)
    while not scope.oom_kills():  # the kernel counts a moment after the kill
        os.sched_yield()
    return "memory.events" if tree.kind == "v2" else "memory.oom_control, eventfd"


def _peak(tree: Tree, _: JobScope) -> str:
    for note in tree.missing_features():
        if note.startswith("peak memory"):
            raise Missing(note)
    return "memory.peak" if tree.kind == "v2" else "memory.max_usage_in_bytes"


def _buffered(tree: Tree, _: JobScope) -> str:
    for note in tree.missing_features():
        if note.startswith("buffered writes"):
            raise Missing(note)
    return "io.max with writeback"
