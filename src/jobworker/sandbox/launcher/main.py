"""The launcher: the process that starts, watches and ends jobs with root's rights.

Root starts it. It has one thread, beside one that reaps (`sandbox.reaper`), and uses the standard
library alone. Its only input is the policy, once, and then the requests of
`sandbox.protocol.operations`. Either a service starts it before the service drops its privileges,
and then the launcher ends with the service; or it runs on its own and outlives services. It opens
what it needs by descriptor, moves into a mount namespace that holds the jobs' root and little else,
and then runs `sandbox.launcher.loop`.

What must hold: nothing is imported after the move, since Python's files cannot be reached then.
"""

import contextlib
import gc
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from jobworker import sd_notify
from jobworker.descriptor_limit import settable_limits
from jobworker.errors import HostUnsupported, JobworkerError
from jobworker.sandbox import channel
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.cgroup.hierarchy import (
    ScopeLimits,
    Tree,
    most_processes,
    open_tree,
    sweep_elsewhere,
)
from jobworker.sandbox.disk.images import DiskSettings, rounded
from jobworker.sandbox.kernel_memory.measure import open_locks
from jobworker.sandbox.kernel_memory.sockets import tell_what_cannot_be_listed
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.loop import Launcher
from jobworker.sandbox.launcher.own_namespace import become_root, split
from jobworker.sandbox.log import log_last_words, log_line, open_log
from jobworker.sandbox.protocol.greeting import NotReady, Ready, message_of
from jobworker.sandbox.protocol.policy import (
    LauncherPolicy,
    carried_in,
    policy_from,
    service_uid_in,
)
from jobworker.sandbox.root import host_view as rootfs
from jobworker.sandbox.root import plain_root
from jobworker.sandbox.seccomp import program as bpf
from jobworker.sandbox.user_namespaces import Ids
from jobworker.standard_streams import fill_standard_streams
from jobworker.storage import MAX_VOLUMES

DESCRIPTORS_PER_CHILD = 23
"""The most descriptors that a child takes: process, gateway, pipes, report, order, disk and image,
root, socket, memory events, directories of its scope (seven on v1), replies, the image again after
its end, two for a process that inspects it and cannot be ended, and the process again while its
host name is set."""


def _warm_up(tree: Tree) -> None:
    """Set limits once: at the first I/O limit the kernel needs some 40 ms to prepare itself."""
    scope = tree.create("warm-up")
    try:
        scope.arm(ScopeLimits(io_bps=1 << 30 if "io" in tree.by_controller else 0))
    finally:
        scope.remove()
    if "cpuset" in tree.by_controller:
        tree.cores()


def _raise_descriptor_limit(policy: LauncherPolicy) -> int:
    """Raise the limit on open files for the descriptors of all children: getrlimit(2).

    Returns how many volumes all jobs may have together, since each takes one more descriptor.
    Raises HostUnsupported if the hard limit is too low.
    """
    needed = 64 + DESCRIPTORS_PER_CHILD * (policy.max_jobs + policy.spares)
    volumes = MAX_VOLUMES * policy.max_jobs
    soft, hard = settable_limits()
    if hard < needed:
        raise HostUnsupported(
            f"cannot run {policy.max_jobs} jobs at a time: that takes {needed} descriptors, "
            f"and {hard} may be open",
            remedy="raise the limit (LimitNOFILE=, ulimit -n, fs.nr_open) or lower "
            "worker.max_concurrent_jobs",
        )
    volumes = min(volumes, hard - needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed + volumes), hard))
    return volumes


def main(descriptor: int) -> NoReturn:
    """Run the launcher on an inherited SOCK_SEQPACKET socket whose first message is the policy.

    The message may have descriptors, which its `carries` names. `lock` and `ids` are locks, which
    the launcher holds until its end. `listener` is the socket on which it admits services; without
    it the launcher serves the sender of the policy. `notify` is the socket of the process that
    supervises the launcher (sd_notify(3)).
    """
    fill_standard_streams()
    os.set_inheritable(descriptor, False)
    open_log()
    link = socket.socket(fileno=descriptor)
    received = channel.receive(link)
    if received is None:
        sys.exit(1)
    message, passed = received
    place, uids = None, frozenset[int]()
    with contextlib.ExitStack() as undo:
        try:
            carried = carried_in(message, passed)
            if "listener" in carried:
                place, uids = (
                    _Place.of(carried["listener"]),
                    frozenset({0, service_uid_in(message)}),
                )
            policy = policy_from(message)
            has_rights, ids = os.geteuid() == 0, Ids(policy.first_uid)
            if not has_rights:
                ids = split(become_root(), policy.max_jobs + policy.spares)
            # These are read before the new process namespace, which has values of its own.
            locks, most = open_locks(), most_processes()
            tell_what_cannot_be_listed()
            _become_first_process([descriptor, *passed], carried.get("lock"), place)
            tree, pool = _prepare(policy, ids, undo, most, has_rights=has_rights)
        except JobworkerError as error:
            if place is None:
                with contextlib.suppress(OSError):  # else the service has gone: the log has it
                    word = NotReady(error.code, error.message, error.remedy)
                    channel.send(link, message_of(word))
                    sys.exit(1)
            else:
                place.clear()
            log_last_words(str(error))
            sys.exit(error.exit_code)
        gaps = (*tree.missing_features(), *pool.gaps, *ids.gaps)
        told = {name: value for name, value in message.items() if name != "carries"}
        ready = Ready(tree.kind, gaps, told, bounds_disks=has_rights, keeps_asks=True)
        launcher = Launcher(pool, policy.spares, message_of(ready), locks)
        if place is None:
            launcher.serve_one(link)
        else:
            link.close()
            listener = socket.socket(fileno=carried["listener"])
            launcher.serve_callers(listener, uids)
            log_line(f"listening at {listener.getsockname()}", "INFO")
            _notify(carried.get("notify"), "READY=1")
        launcher.run()
    sys.exit(0)


def _notify(descriptor: int | None, text: str) -> None:
    if descriptor is not None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as notify:
            sd_notify.send(notify, text)


class _Place(NamedTuple):
    """The path of a socket's file, with its device and inode numbers."""

    path: str
    identity: tuple[int, int]

    @classmethod
    def of(cls, listener: int) -> "_Place":
        with socket.socket(fileno=os.dup(listener)) as sock:
            path = str(sock.getsockname())
        return cls(path, cls._identity_at(path))

    @staticmethod
    def _identity_at(path: str) -> tuple[int, int]:
        try:
            status = os.lstat(path)
        except OSError:
            return 0, 0
        return status.st_dev, status.st_ino

    def clear(self) -> None:
        """Remove the file, unless another file has taken its path."""
        with contextlib.suppress(OSError):
            if self._identity_at(self.path) == self.identity:
                os.unlink(self.path)


def _become_first_process(links: Sequence[int], lock: int | None, place: _Place | None) -> None:
    """Go on as PID 1 of a new process namespace. The original process, the guard, waits for it.

    When PID 1 dies, the kernel kills all processes of its namespace (pid_namespaces(7)). So no job
    can outlive the launcher, even if the job resets PR_SET_PDEATHSIG. The launcher in turn dies
    with the guard. When memory runs out, the kernel kills these two last.

    A launcher that runs on its own cannot reach its socket's file at `place` any more. So the guard
    removes the file. It holds the `lock` until then, so that the file cannot be another launcher's.
    """
    on_its_own = place is not None
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-900")  # a job sets its own back to 0: `SetOomScore`
    alive, keep = os.pipe2(os.O_CLOEXEC)
    if on_its_own:  # the kernel delivers no signal without a handler to PID 1
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sc.unshare(sc.CLONE_NEWPID)
    pid = os.fork()
    if pid:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if on_its_own and number != signal.SIGHUP:
                signal.signal(number, lambda *_: os.kill(pid, signal.SIGTERM))
            else:
                signal.signal(number, signal.SIG_IGN)  # the launcher ends when its service ends
        os.close(alive)
        # The other sides see the end of the launcher by the end of these streams.
        channel.close_all([each for each in links if place is None or each != lock])
        _, status = os.waitpid(pid, 0)
        if place is not None:
            place.clear()
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.close(keep)
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([alive], [], [], 0)[0]:
        os._exit(1)  # the guard died before the prctl(2)
    os.close(alive)


def _prepare(
    policy: LauncherPolicy, ids: Ids, undo: contextlib.ExitStack, most: int, *, has_rights: bool
) -> tuple[Tree, ChildPool]:
    """Prepare everything before the first request: limits, groups, mounts, fork server.

    `undo` gets the removal of the control groups. Raises JobworkerError, such as HostUnsupported.
    """
    room_for_volumes = _raise_descriptor_limit(policy)
    bpf.try_out(policy.filters)
    tree = open_tree(policy.controllers, policy.instance, policy.cgroup_parent, most)
    undo.callback(_close, tree)
    try:
        tree.sweep()
    except OSError as error:
        raise HostUnsupported(
            f"cannot clear away what an earlier service left in control groups: {error}",
            remedy=f"see what still runs in the groups called {policy.instance}",
        ) from error
    try:
        sweep_elsewhere(tree, policy.cgroup_parent)
    except OSError as error:  # the group is empty and harms nothing
        log_line(f"cannot clear away all groups that an earlier launcher left: {error}")
    shown = (policy.programs, policy.etc)
    if policy.runtimes and not has_rights:
        raise HostUnsupported(
            f"cannot offer the runtime {next(iter(policy.runtimes))} without root's rights",
            remedy="run the service as root, or take [runtimes] out of the configuration",
        )
    stage = (
        rootfs.enter(
            *(policy.stage, policy.scratch, policy.volumes, *shown),
            DiskSettings(rounded(policy.disk_bytes), policy.keep_free_bytes, not policy.overcommit),
            policy.runtimes,
        )
        if has_rights
        else plain_root.enter(policy.stage, policy.scratch, *shown)
    )
    _warm_up(tree)
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    gc.collect()  # later collections would write to pages that the fork server shares
    gc.freeze()
    gc.disable()
    pool = ChildPool(tree, policy, ids, stage, room_for_volumes)
    pool.sweep_scratch()
    return tree, pool


def _close(tree: Tree) -> None:
    # If a process is left that cannot die, the next launcher sweeps its group.
    with contextlib.suppress(OSError):
        tree.close()
