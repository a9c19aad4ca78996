"""The launcher's children: one for each spare and each job, made, watched and cleared away.

The nursery makes children from free slots and takes everything back when one has ended: process,
scope, files, descriptors. The pipes alone stay, for who reads what is left in them. What is
half-made when a step fails goes too.

Standard library only.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections import deque
from collections.abc import Sequence

from jobworker.errors import SandboxError
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.cgroup.hierarchy import Limits, Scope, Tree
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.disk.images import rounded
from jobworker.sandbox.disk.volumes import Volumes, refusal
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.sweepers import MAX_KEPT_DISKS, Sweepers
from jobworker.sandbox.launcher.terminals import terminals_each
from jobworker.sandbox.network.modes import Networks
from jobworker.sandbox.network.slirp import Layout
from jobworker.sandbox.protocol.policy import Policy
from jobworker.sandbox.root.stage import Stage
from jobworker.sandbox.start import init_program, landlock, trampoline
from jobworker.sandbox.start.apply import Means
from jobworker.sandbox.start.child import become_job
from jobworker.sandbox.start.plan import Order, OwnNetwork, Sizes, Slot, View, finish, prepare
from jobworker.sandbox.start.private_network import Way
from jobworker.sandbox.start.steps import ROOT, Step, explain
from jobworker.sandbox.user_namespaces import Ids, make_user_namespace

PIPE_BYTES = 1 << 20
"""Room for output while nobody reads, such as between two turns of the service."""

_NAMESPACES = sc.CLONE_NEWPID | sc.CLONE_NEWNS | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS


class Nursery:
    """Makes and clears children; holds the slots."""

    def __init__(
        self, tree: Tree, policy: Policy, ids: Ids, stage: Stage, room_for_volumes: int
    ) -> None:
        self._tree, self._policy, self._ids, self._stage = tree, policy, ids, stage
        self.sweepers = Sweepers()
        self.volumes = Volumes(stage.volumes, room_for_volumes)
        self._free = deque(range(self.slots))
        self._start = os.urandom(3).hex()
        """Names of this start differ from those that an earlier one left to be swept."""
        self._made = 0
        self._scope_ahead: Scope | None = None
        self._terminals = terminals_each(self.slots)
        self._landlock = landlock.open_scope()
        self._trampoline, self._init = trampoline.open_program(), init_program.open_init()
        behind = ids.first_of(self.slots) + 1  # and behind the service's own
        self.networks = Networks(stage.view, behind, self._landlock)

    @property
    def gaps(self) -> tuple[str, ...]:
        """What this host cannot do for its jobs, in words."""
        own = () if self._landlock is not None else (landlock.GAP,)
        return (*own, *self._stage.gaps)

    @property
    def usual_disk_bytes(self) -> int:
        """The size of the disk of a job that asks for none."""
        return self._policy.disk_bytes

    @property
    def overcommits(self) -> bool:
        """Whether jobs' disks take what is written to them, and not their size at once."""
        return self._policy.overcommit

    @property
    def slots(self) -> int:
        """How many children there may be at a time."""
        return self._policy.max_jobs + self._policy.spares

    def has_room(self) -> bool:
        """Whether another child can be made."""
        return bool(self._free)

    def make_scope_ahead(self) -> bool:
        """Make the control group of the next child, if there is none: whether there was none.

        The kernel has one lock for all control groups, which may take ten milliseconds: a turn of
        the launcher's of its own. Raises SandboxError.
        """
        if self._scope_ahead is not None:
            return False
        self._scope_ahead = self._new_scope()
        return True

    def remove_scope_ahead(self) -> None:
        """Remove it: no child is made any more. Raises OSError."""
        if self._scope_ahead is not None:
            self._scope_ahead.remove()
            self._scope_ahead = None

    def _new_scope(self) -> Scope:
        self._made += 1
        return self._tree.create(f"job-{self._start}-{self._made}")

    def make(self, order: Order | None = None) -> Child:
        """Clone a child that prepares itself, for `order` or as a spare.

        Raises OSError or SandboxError, and then nothing is left of it.
        """
        view = self._stage.view_for(order)
        if not self._free:
            raise SandboxError("every range of ids is in use", data={"step": "place"})
        index = self._free.popleft()  # the one that has rested longest
        with contextlib.ExitStack() as undo:
            undo.callback(self._free.appendleft, index)
            scope, self._scope_ahead = self._scope_ahead or self._new_scope(), None
            slot = Slot(scope.name, self._ids.first_of(index), self._ids.each)
            child = Child(slot, index, scope)
            undo.callback(child.scope.remove)
            if order is not None and order.volumes:
                if self.sweepers.count_kept() >= MAX_KEPT_DISKS:
                    raise refusal(errno.ETOOMANYREFS, order.volumes[0][0])
                child.volumes = tuple(name for name, _ in order.volumes)
                child.shares = True
                images = self.volumes.take(child.volumes)
                undo.callback(self.volumes.give_back, child.volumes)
                view = _with_volumes(view, order, images)
            self._clone(child, view, order, undo)
            undo.pop_all()
        return child

    def plan(self, order: Order, limits: Limits) -> list[tuple[str, str, str]]:
        """The steps by which `order` would be started, told; raises SandboxError like `make`."""
        self._tree.check_controllers(limits)
        own_network, _ = self.networks.describe(order)
        slot = Slot("job", self._ids.first_of(0), self._ids.each)
        view = self._stage.view_for(order)
        images = [self.volumes.path(name) for name, _ in order.volumes]
        steps = self._steps(slot, _with_volumes(view, order, images), order, own_network)
        return [explain(step) for step in (*steps, *finish(order))]

    def _steps(
        self, slot: Slot, view: View, order: Order | None, own_network: OwnNetwork | None
    ) -> tuple[Step, ...]:
        disk = (order.disk_bytes if order else 0) or self._policy.disk_bytes
        sizes = Sizes(rounded(disk), self._policy.tmpfs_bytes, self._terminals)
        return prepare(ROOT, view, slot, sizes, order, own_network)

    def _clone(
        self, child: Child, view: View, order: Order | None, undo: contextlib.ExitStack
    ) -> None:
        own_network, layout = self.networks.describe(order)
        with contextlib.ExitStack() as theirs:
            user_namespace = _closed_by(theirs, _user_namespace(child.slot))
            memory = _closed_by(undo, os.memfd_create("order", os.MFD_CLOEXEC))
            stdout, stdout_of_job = _open_pipe(undo, theirs)
            stderr, stderr_of_job = _open_pipe(undo, theirs)
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.callback(far.close)
            undo.callback(near.close)
            near.setblocking(False)
            steps = self._steps(child.slot, view, order, own_network)
            way = None if layout is None else self._open_way(child, layout, undo, theirs)
            has_init = order is not None and order.init
            means = Means(
                scope=child.scope,
                stdout=stdout_of_job,
                stderr=stderr_of_job,
                status=far.fileno(),
                order=memory,
                trampoline=self._trampoline,
                user_namespace=user_namespace,
                filters=self._policy.filters,
                landlock=self._landlock,
                workshop=self._stage.workshop,
                way=way,
                init=self._init if has_init else -1,
                report=_open_report(child, undo, theirs) if has_init else -1,
            )
            child.pid, child.pidfd = sc.clone3(_NAMESPACES, child.scope.clone_fd)
            if child.pid == 0:
                become_job(steps, means)
        child.sock, child.order = near, memory
        child.stdout, child.stderr = stdout, stderr

    def _open_way(
        self,
        child: Child,
        layout: Layout,
        undo: contextlib.ExitStack,
        theirs: contextlib.ExitStack,
    ) -> Way:
        """Start the gateway of a child's own network; the child gets what is answered."""
        child.gateway, link = self.networks.open_gateway(layout, child.index, child.scope)
        _closed_by(theirs, link)
        undo.callback(self.sweepers.end, child.gateway)
        child.layout, child.wall = layout, self.networks.wall_for(layout)
        return Way(link=link, process=child.gateway, wall=child.wall, neighbours=layout.neighbours)

    def clear(self, child: Child) -> None:
        """Take back all that a reaped child had, but for its pipes.

        Its disk goes at once. Raises OSError if its scope is still busy: it keeps its slot then,
        and this may be called again.
        """
        disk, root = child.disk, child.root
        if disk is not None:
            child.disk = child.root = None  # before: this may be called again, whatever fails
            self.sweepers.discard_disk(disk, root, shared=child.shares)
        if child.gateway is not None:
            raise OSError(errno.EBUSY, "its gateway has not been reaped")
        child.scope.remove()
        if child.sock is not None:
            child.sock.close()
            child.sock = None
        close_all([child.pidfd, child.order, child.report])
        child.pidfd = child.order = child.report = -1
        if self._stage.view.scratch:
            self.sweepers.remove(f"{self._stage.view.scratch}/{child.slot.name}")
        self._free.append(child.index)

    def give_back_volumes(self, child: Child) -> None:
        """Let others remove the volumes that a child had."""
        roots, child.volume_roots = list(child.volume_roots.values()), {}
        volumes, child.volumes = child.volumes, ()
        self.volumes.give_back(volumes)
        self.sweepers.close(roots)

    def close_pipes(self, child: Child) -> None:
        """Let go of a child's pipes, with what nobody has read."""
        close_all([child.stdout, child.stderr])
        child.stdout = child.stderr = -1

    def sweep_scratch(self) -> None:
        """Have everything removed that an earlier launcher left on disk."""
        for path in self._stage.left_over():
            self.sweepers.remove(path)


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


def _open_report(child: Child, undo: contextlib.ExitStack, theirs: contextlib.ExitStack) -> int:
    """The end of a pipe that a child's init writes to; the child object has the other one."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    child.report = _closed_by(undo, read)
    return _closed_by(theirs, write)


def _with_volumes(view: View, order: Order, images: Sequence[str]) -> View:
    found = ((name, image, at) for (name, at), image in zip(order.volumes, images, strict=True))
    return view._replace(volumes=tuple(found))


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
