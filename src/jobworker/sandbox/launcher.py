"""The launcher: the one process with root's rights, from its start to its end.

It is started before the service drops its privileges, with the standard library alone, one
thread, and no way to be told anything but its policy, once, and then the requests of
`sandbox.requests`. It opens what it needs by descriptor, moves into a mount namespace that holds
the jobs' root and little else, and then runs `sandbox.launcher_loop`.

Nothing is imported after that: Python's own files are out of reach then.
"""

import contextlib
import gc
import os
import resource
import socket
import sys
from typing import NoReturn

from jobworker.errors import HostUnsupported, JobworkerError
from jobworker.sandbox import channel, rootfs
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.cgroups import Limits, Tree, open_tree
from jobworker.sandbox.children import Nursery, Policy, policy_from
from jobworker.sandbox.launcher_loop import Launcher

DESCRIPTORS_PER_CHILD = 8
"""Process, two pipes, socket, scope (two), user namespace; and room for replies on their way."""


def _warm_up(tree: Tree) -> None:
    """Set limits once: the first time the kernel takes some 40 ms to get its I/O limits ready."""
    scope = tree.create("warm-up")
    try:
        scope.arm(Limits(io_bps=1 << 30 if "io" in tree.by_controller else 0))
    finally:
        scope.remove()


def _raise_descriptor_limit(policy: Policy) -> None:
    """Have room for the descriptors of all children: getrlimit(2)."""
    needed = 64 + DESCRIPTORS_PER_CHILD * (policy.max_jobs + policy.spares)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise HostUnsupported(
            f"cannot run {policy.max_jobs} jobs at a time: that takes {needed} descriptors, "
            f"and {hard} may be open",
            remedy="raise the limit (LimitNOFILE=, ulimit -n) or lower worker.max_concurrent_jobs",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))


def main(descriptor: int) -> NoReturn:
    """Run the launcher on an inherited SOCK_SEQPACKET socket whose first message is the policy."""
    os.set_inheritable(descriptor, False)
    link = socket.socket(fileno=descriptor)
    received = channel.receive(link)
    if received is None:
        sys.exit(1)
    with contextlib.ExitStack() as undo:
        try:
            policy = policy_from(received[0])
            tree, nursery = _prepare(policy, undo)
        except JobworkerError as error:
            problem = {"code": error.code, "message": error.message, "remedy": error.remedy}
            channel.send(link, {"error": problem})
            sys.exit(1)
        gc.collect()
        gc.freeze()
        gc.disable()
        channel.send(link, {"ready": tree.kind, "gaps": list(tree.missing_features())})
        link.setblocking(False)
        Launcher(link, nursery, policy.spares).run()
        nursery.close()
    sys.exit(0)


def _prepare(policy: Policy, undo: contextlib.ExitStack) -> tuple[Tree, Nursery]:
    """Do all that comes before the first request; what it made of control groups is undone."""
    _raise_descriptor_limit(policy)
    tree = open_tree(policy.controllers, policy.instance, policy.cgroup_parent)
    undo.callback(_close, tree)
    tree.sweep()
    rootfs.enter(policy.stage, policy.scratch, policy.programs, policy.etc)
    nursery = Nursery(tree, policy, rootfs.ROOT, rootfs.SCRATCH)
    nursery.sweep_scratch()
    _warm_up(tree)
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    return tree, nursery


def _close(tree: Tree) -> None:
    with contextlib.suppress(
        OSError
    ):  # something is left that would not die: the next start sweeps
        tree.close()
