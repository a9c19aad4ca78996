"""Functions of the fork server that make a child and its scope, and kill and remove scopes.

All of them may wait for the kernel's locks on control groups, as long as others hold them (see
`sandbox.fork_server`). `launcher.children` calls them, and gets descriptors of what was made.

What must hold: if the answer does not reach the launcher, the child executes no program. It needs
its order and its socket, and their other ends are closed then.

Standard library only.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

from jobworker.errors import JobworkerError, SandboxError
from jobworker.sandbox import fork_server
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.cgroup.hierarchy import JobScope, Tree
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.disk.images import ImageSettings
from jobworker.sandbox.fork_server import Answer, Function
from jobworker.sandbox.network.modes import Networks
from jobworker.sandbox.network.slirp import Layout
from jobworker.sandbox.seccomp.program import Filters
from jobworker.sandbox.start.apply import StepContext
from jobworker.sandbox.start.child import become_job
from jobworker.sandbox.start.plan import Slot
from jobworker.sandbox.start.private_network import GatewayHandle
from jobworker.sandbox.start.steps import Step
from jobworker.sandbox.user_namespaces import make_user_namespace

PIPE_BYTES = 1 << 20
"""The size of a job's output pipes: a job can go on writing while the service does not read, such
as between two turns of its event loop. 1 MiB is the default of pipe-max-size: pipe(7)."""

_NAMESPACES = sc.CLONE_NEWPID | sc.CLONE_NEWNS | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS


class ChildRequest(NamedTuple):
    """The description of a child that the fork server is to make."""

    slot: Slot
    """The child's scope has the slot's name."""
    place: int
    """The number of its slot."""
    steps: tuple[Step, ...]
    layout: Layout | None
    """The layout of its network, if it has a gateway."""
    wall: bytes
    has_init: bool


class ChildDescriptors(NamedTuple):
    """The launcher's descriptors of a child; -1 for a kind that the child does not have."""

    pidfd: int
    sock: int
    """The launcher's end of its socket."""
    order: int
    stdout: int
    stderr: int
    gateway: int = -1
    report: int = -1
    oom: int = -1
    scope: tuple[int, ...] = ()
    """The directories of its scope, in the order of the tree's `tops`."""


class ChildMaker:
    """Makes children. The fork server has it from the fork, and is the only one to use it."""

    def __init__(
        self,
        tree: Tree,
        networks: Networks,
        filters: Filters,
        image_settings: ImageSettings | None,
        *,
        landlock: int | None,
        trampoline: int,
        init: int,
    ) -> None:
        self._tree, self._networks = tree, networks
        self._filters, self._image_settings = filters, image_settings
        self._landlock, self._trampoline, self._init = landlock, trampoline, init

    @property
    def descriptors(self) -> list[int]:
        """The descriptors that the fork server needs to make children."""
        own = [*self._tree.tops, self._trampoline, self._init]
        return own if self._landlock is None else [*own, self._landlock]

    @property
    def functions(self) -> dict[str, Function]:
        """The functions that the launcher may call, by name."""
        return {"make": self._make, "kill": self._kill, "remove": self._remove}

    def _kill(self, name: str) -> Answer:
        """Send SIGKILL to all processes in a scope."""
        self._tree.adopt(name).kill()
        return {}, []

    def _remove(self, name: str) -> Answer:
        """Remove a scope, if it exists. Raises OSError (EBUSY) while it has processes."""
        self._tree.adopt(name).remove()
        return {}, []

    def _make(self, wanted: ChildRequest) -> Answer:
        """Make a child. The answer has its pid, its descriptors, and the names of their kinds.

        If that fails, nothing of the child is left except for the gateway of its network. The
        gateway is a child of the launcher, so the answer has its pid, and the launcher ends it.
        """
        with contextlib.ExitStack() as undo:
            scope = self._tree.create(wanted.slot.name)
            undo.callback(_remove_half_made, scope)
            gateways: list[int] = []
            try:
                made, pid = self._clone(wanted, scope, undo, gateways)
            except (OSError, JobworkerError) as error:
                told = {"gateway_pid": gateways[0]} if gateways else {}
                return {**told, **fork_server.failure(error)}, []
            undo.pop_all()
        pairs = [pair for pair in made._asdict().items() if pair[0] != "scope" and pair[1] >= 0]
        told = {"gateway_pid": gateways[0]} if gateways else {}
        if scope.clone_fd is not None:
            os.close(scope.clone_fd)
        named = [name for name, _ in pairs]
        descriptors = [*(descriptor for _, descriptor in pairs), *made.scope]
        return {**told, "pid": pid, "descriptors": named}, descriptors

    def _clone(
        self, wanted: ChildRequest, scope: JobScope, undo: contextlib.ExitStack, gateways: list[int]
    ) -> tuple[ChildDescriptors, int]:
        with contextlib.ExitStack() as theirs:
            user_namespace = _closed_by(theirs, _user_namespace(wanted.slot))
            memory = _closed_by(undo, os.memfd_create("order", os.MFD_CLOEXEC))
            stdout, stdout_of_job = _open_pipe(undo, theirs)
            stderr, stderr_of_job = _open_pipe(undo, theirs)
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.callback(far.close)
            sock = _closed_by(undo, near.detach())
            os.set_blocking(sock, False)
            directories = self._tree.open_directories(scope.name)
            undo.callback(close_all, directories)
            gateway, gateway_handle = -1, None
            if wanted.layout is not None:
                gateway, gateway_handle = self._open_gateway(
                    wanted, wanted.layout, scope, undo, theirs, gateways
                )
            report, report_of_init = _open_report(undo, theirs) if wanted.has_init else (-1, -1)
            context = StepContext(
                scope=scope,
                stdout=stdout_of_job,
                stderr=stderr_of_job,
                status=far.fileno(),
                order=memory,
                trampoline=self._trampoline,
                user_namespace=user_namespace,
                filters=self._filters,
                landlock=self._landlock,
                image_settings=self._image_settings,
                gateway_handle=gateway_handle,
                init=self._init if wanted.has_init else -1,
                report=report_of_init,
            )
            pid, pidfd = sc.clone3(_NAMESPACES | sc.CLONE_PARENT, scope.clone_fd)
            if pid == 0:
                become_job(wanted.steps, context)
        oom = -1 if scope.oom_fd is None else scope.oom_fd
        scopes = tuple(directories)
        return ChildDescriptors(
            pidfd, sock, memory, stdout, stderr, gateway, report, oom, scopes
        ), pid

    def _open_gateway(
        self,
        wanted: ChildRequest,
        layout: Layout,
        scope: JobScope,
        undo: contextlib.ExitStack,
        theirs: contextlib.ExitStack,
        gateways: list[int],
    ) -> tuple[int, GatewayHandle]:
        """Start the gateway of a child's own network.

        Returns the gateway's pidfd, and what the child needs to build its side of the network.
        """
        pid, gateway, link = self._networks.open_gateway(layout, wanted.place, scope)
        gateways.append(pid)
        _closed_by(undo, gateway)
        _closed_by(theirs, link)
        gateway_handle = GatewayHandle(
            link=link, process=gateway, wall=wanted.wall, neighbours=layout.neighbours
        )
        return gateway, gateway_handle


def _remove_half_made(scope: JobScope) -> None:
    """Remove the scope of a child that was not made.

    If it is busy, it stays: the launcher removes it again by name when it clears the child.
    """
    with contextlib.suppress(OSError):
        scope.remove()
    scope.close()


def _closed_by(stack: contextlib.ExitStack, descriptor: int) -> int:
    """Return the descriptor, and have `stack` close it."""
    stack.callback(close_all, [descriptor])
    return descriptor


def _open_pipe(undo: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe for a child's output: the launcher's end to read, and the child's end to write."""
    read, write = os.pipe2(os.O_CLOEXEC)
    _closed_by(undo, read)
    _closed_by(theirs, write)
    os.set_blocking(read, False)
    with contextlib.suppress(PermissionError):  # above pipe-max-size: it keeps the usual size
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return read, write


def _open_report(undo: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    """The pipe in which a child's init reports the program's end: our end, and the init's end."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    return _closed_by(undo, read), _closed_by(theirs, write)


def _user_namespace(slot: Slot) -> int:
    """A new user namespace for a child: see `make_user_namespace`.

    Raises SandboxError with the step that needs it, and OSError if the fork server lacks a process,
    memory or a descriptor.
    """
    try:
        return make_user_namespace(slot.first_uid, slot.ids)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.ENOSPC:  # user_namespaces(7): the limit on their number is reached
            reason = "the host's limit on them is reached"
        elif error.errno not in (errno.EPERM, errno.EACCES):  # lacks a process, memory, descriptor
            raise
        raise SandboxError(
            f"cannot make a user namespace: {reason}", data={"step": "enter-user-namespace"}
        ) from error


def descriptors_of(names: Sequence[str], descriptors: Sequence[int]) -> ChildDescriptors:
    """The descriptors of an answer, first those in `names`, then the scope's directories."""
    named = dict(zip(names, descriptors, strict=False))
    return ChildDescriptors(**named, scope=tuple(descriptors[len(names) :]))
