"""What the fork server does for a child: it makes it and its control groups, and removes these.

All of it waits for the kernel's locks on groups, for as long as others hold them (see
`sandbox.fork_server`). The launcher has what is made by its descriptors: `launcher.children` asks
for it.

What must hold: a child that the launcher was not told of comes to nothing. It needs its order and
its socket, whose other ends are closed then.

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
from jobworker.sandbox.cgroup.hierarchy import Scope, Tree
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.disk.images import Workshop
from jobworker.sandbox.fork_server import Answer, Function
from jobworker.sandbox.network.modes import Networks
from jobworker.sandbox.network.slirp import Layout
from jobworker.sandbox.seccomp.program import Filters
from jobworker.sandbox.start.apply import Means
from jobworker.sandbox.start.child import become_job
from jobworker.sandbox.start.plan import Slot
from jobworker.sandbox.start.private_network import Way
from jobworker.sandbox.start.steps import Step
from jobworker.sandbox.user_namespaces import make_user_namespace

PIPE_BYTES = 1 << 20
"""Room for output while nobody reads, such as between two turns of the service."""

_NAMESPACES = sc.CLONE_NEWPID | sc.CLONE_NEWNS | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS


class Wanted(NamedTuple):
    """A child to be made."""

    slot: Slot
    """Its name is that of its scope, too."""
    place: int
    """The number of its slot."""
    steps: tuple[Step, ...]
    layout: Layout | None
    """That of its network, where it has a gateway."""
    wall: bytes
    has_init: bool


class Made(NamedTuple):
    """The descriptors of a child that was made, by what they are; -1 where it has none."""

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
    """Directories of its scope."""


class Maker:
    """Makes children; it is forked with the fork server, and used there alone."""

    def __init__(
        self,
        tree: Tree,
        networks: Networks,
        filters: Filters,
        workshop: Workshop | None,
        *,
        landlock: int | None,
        trampoline: int,
        init: int,
    ) -> None:
        self._tree, self._networks = tree, networks
        self._filters, self._workshop = filters, workshop
        self._landlock, self._trampoline, self._init = landlock, trampoline, init

    @property
    def descriptors(self) -> list[int]:
        """Those that the fork server needs."""
        own = [*self._tree.tops, self._trampoline, self._init]
        return own if self._landlock is None else [*own, self._landlock]

    @property
    def functions(self) -> dict[str, Function]:
        """What the launcher may ask for, by name."""
        return {"make": self._make, "kill": self._kill, "remove": self._remove}

    def _kill(self, name: str) -> Answer:
        """SIGKILL everything in a scope."""
        self._tree.adopt(name).kill()
        return {}, []

    def _remove(self, name: str) -> Answer:
        """Remove a scope; one that is gone is fine. Raises OSError (EBUSY) while it is in use."""
        self._tree.adopt(name).remove()
        return {}, []

    def _make(self, wanted: Wanted) -> Answer:
        """Make a child: its pid, and a descriptor of each kind that is named.

        Where that fails nothing of it is left, but for the gateway of its network, which is the
        launcher's child: its number is told then.
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
        self, wanted: Wanted, scope: Scope, undo: contextlib.ExitStack, gateways: list[int]
    ) -> tuple[Made, int]:
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
            gateway, way = -1, None
            if wanted.layout is not None:
                gateway, way = self._open_way(wanted, wanted.layout, scope, undo, theirs, gateways)
            report, report_of_init = _open_report(undo, theirs) if wanted.has_init else (-1, -1)
            means = Means(
                scope=scope,
                stdout=stdout_of_job,
                stderr=stderr_of_job,
                status=far.fileno(),
                order=memory,
                trampoline=self._trampoline,
                user_namespace=user_namespace,
                filters=self._filters,
                landlock=self._landlock,
                workshop=self._workshop,
                way=way,
                init=self._init if wanted.has_init else -1,
                report=report_of_init,
            )
            pid, pidfd = sc.clone3(_NAMESPACES | sc.CLONE_PARENT, scope.clone_fd)
            if pid == 0:
                become_job(wanted.steps, means)
        oom = -1 if scope.oom_fd is None else scope.oom_fd
        scopes = tuple(directories)
        return Made(pidfd, sock, memory, stdout, stderr, gateway, report, oom, scopes), pid

    def _open_way(
        self,
        wanted: Wanted,
        layout: Layout,
        scope: Scope,
        undo: contextlib.ExitStack,
        theirs: contextlib.ExitStack,
        gateways: list[int],
    ) -> tuple[int, Way]:
        """Start the gateway of a child's own network: its pidfd, and what the child gets."""
        pid, gateway, link = self._networks.open_gateway(layout, wanted.place, scope)
        gateways.append(pid)
        _closed_by(undo, gateway)
        _closed_by(theirs, link)
        way = Way(link=link, process=gateway, wall=wanted.wall, neighbours=layout.neighbours)
        return gateway, way


def _remove_half_made(scope: Scope) -> None:
    """Remove the scope of a child that was not made; the launcher tries again where it is busy."""
    with contextlib.suppress(OSError):
        scope.remove()
    scope.close()


def _closed_by(stack: contextlib.ExitStack, descriptor: int) -> int:
    """The descriptor, which is closed when `stack` is."""
    stack.callback(close_all, [descriptor])
    return descriptor


def _open_pipe(undo: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe for output of a child's: our end to read from, and its end to write to."""
    read, write = os.pipe2(os.O_CLOEXEC)
    _closed_by(undo, read)
    _closed_by(theirs, write)
    os.set_blocking(read, False)
    with contextlib.suppress(PermissionError):  # beyond pipe-max-size: smaller, then
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return read, write


def _open_report(undo: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    """The pipe that a child's init writes to: our end, and its end."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    return _closed_by(undo, read), _closed_by(theirs, write)


def _user_namespace(slot: Slot) -> int:
    """See `make_user_namespace`; raises SandboxError by the name of the step that needs it."""
    try:
        return make_user_namespace(slot.first_uid, slot.ids)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.ENOSPC:  # user_namespaces(7)'s word for a limit that is reached
            reason = "the host's limit on them is reached"
        elif error.errno not in (errno.EPERM, errno.EACCES):  # no process, memory or descriptor
            raise
        raise SandboxError(
            f"cannot make a user namespace: {reason}", data={"step": "enter-user-namespace"}
        ) from error


def made_of(names: Sequence[str], descriptors: Sequence[int]) -> Made:
    """What an answer has brought: the names that it tells, and then the scope's directories."""
    named = dict(zip(names, descriptors, strict=False))
    return Made(**named, scope=tuple(descriptors[len(names) :]))
