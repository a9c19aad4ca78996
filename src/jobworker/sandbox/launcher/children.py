"""Makes the launcher's children, one for each spare and each job, and releases what they held.

The nursery takes a free slot and asks the fork server for a child. When a child has ended, the
nursery releases its scope, files and descriptors, and frees the slot. Only the pipes stay open, so
that the service can read the rest of the output. If a step of the making fails, what the earlier
steps made is removed too.

If the fork server ends while it makes a child, the start does not fail. The program was not
executed, since a child gets its order only after the launcher has its descriptors. So the pool
asks for another child in its place, up to `TRIES` times in all.

Standard library only.
"""

import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from jobworker.errors import HostUnsupported, SandboxError
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits, Tree
from jobworker.sandbox.channel import Message, close_all
from jobworker.sandbox.disk.images import rounded
from jobworker.sandbox.disk.volumes import VolumeStore, refusal
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import DIED, TRIES, ForkServer
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.child_maker import ChildMaker, ChildRequest, descriptors_of
from jobworker.sandbox.launcher.host_names import HostNames
from jobworker.sandbox.launcher.scopes import Scopes
from jobworker.sandbox.launcher.sweepers import MAX_KEPT_DISKS, Sweepers
from jobworker.sandbox.launcher.terminals import terminals_each
from jobworker.sandbox.network.modes import Networks
from jobworker.sandbox.protocol.policy import LauncherPolicy
from jobworker.sandbox.root.stage import Stage
from jobworker.sandbox.start import init_program, landlock, trampoline
from jobworker.sandbox.start.plan import Order, OwnNetwork, RootView, Sizes, Slot, finish, prepare
from jobworker.sandbox.start.steps import ROOT, Step, explain
from jobworker.sandbox.user_namespaces import Ids

OnMade = Callable[[Message | None], None]
"""Called with None when a child was made, or with the reason why none could be made: the step, if
there is one, the errno and the detail."""


class ChildPool:
    """Asks the fork server to make and clear children; owns the slots."""

    def __init__(
        self, tree: Tree, policy: LauncherPolicy, ids: Ids, stage: Stage, room_for_volumes: int
    ) -> None:
        self._tree, self._policy, self._ids, self._stage = tree, policy, ids, stage
        self.volumes = VolumeStore(stage.volumes, room_for_volumes)
        self._free = deque(range(self.slots))
        self._start = os.urandom(3).hex()
        """A random part of the slots' names: they differ from those that an earlier launcher left,
        which are still to be swept."""
        self._made = 0
        self._terminals = terminals_each(self.slots)
        self._landlock = landlock.open_scope()
        behind = ids.first_of(self.slots) + 1  # behind the jobs' ids and the service's own
        self.networks = Networks(stage.view, behind, self._landlock)
        maker = ChildMaker(
            tree,
            self.networks,
            policy.filters,
            stage.image_settings,
            landlock=self._landlock,
            trampoline=trampoline.open_program(),
            init=init_program.open_init(),
        )
        self.event_loop = EventLoop()
        try:
            self.forks = ForkServer(self.event_loop, maker.functions, maker.descriptors)
            self.host_names = HostNames(self.event_loop)
        except OSError as error:
            raise HostUnsupported(
                f"cannot make the launcher's fork server: {error}",
                remedy="let the service have more processes (TasksMax=, ulimit -u)",
            ) from error
        self.sweepers = Sweepers(self.event_loop, self.forks)
        self.scopes = Scopes(self.event_loop, self.forks)

    @property
    def gaps(self) -> tuple[str, ...]:
        """A sentence for each feature that this host cannot offer to jobs."""
        own = () if self._landlock is not None else (landlock.GAP,)
        return (*own, *self._stage.gaps)

    @property
    def usual_disk_bytes(self) -> int:
        """The size of the disk of a job that names no size."""
        return self._policy.disk_bytes

    @property
    def overcommits(self) -> bool:
        """Whether jobs' disks take space as they are written, not their whole size at once."""
        return self._policy.overcommit

    @property
    def slots(self) -> int:
        """The largest number of children at a time."""
        return self._policy.max_jobs + self._policy.spares

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left of children that were cleared or that could not be made."""
        return self.sweepers.is_idle and self.scopes.is_idle and self.forks.is_idle

    def has_room(self) -> bool:
        """Whether another child can be made."""
        return bool(self._free)

    # --- making -----------------------------------------------------------------------------

    def make(self, order: Order | None, on_made: Callable[[Child, Message | None], None]) -> Child:
        """Ask the fork server for a child that prepares itself for `order`, or as a spare for None.

        The child has no process until `on_made` is called. From then on the caller has to `clear`
        it, even if no process could be made. Raises OSError or SandboxError; nothing is left then.
        """
        view = self._stage.view_for(order)
        if not self._free:
            raise SandboxError("every range of ids is in use", data={"step": "place"})
        index = self._free.popleft()  # the slot that has been free for the longest time
        with contextlib.ExitStack() as undo:
            undo.callback(self._free.appendleft, index)
            slot = self._new_slot(index)
            child = Child(slot, index, self._tree.adopt(slot.name))
            if order is not None and order.volumes:
                if self.sweepers.count_kept() >= MAX_KEPT_DISKS:
                    raise refusal(errno.ETOOMANYREFS, order.volumes[0][0])
                names = tuple(name for name, _ in order.volumes)
                images = self.volumes.acquire(names)
                undo.callback(self.volumes.release, names)
                child.volumes, child.shares = names, True
                view = _with_volumes(view, order, images)
            self._ask_for(child, order, view, partial(on_made, child), 1)
            undo.pop_all()
        return child

    def _new_slot(self, index: int) -> Slot:
        self._made += 1
        name = f"job-{self._start}-{self._made}"
        return Slot(name, self._ids.first_of(index), self._ids.each)

    def _ask_for(
        self, child: Child, order: Order | None, view: RootView, on_made: OnMade, tried: int
    ) -> None:
        own_network, layout = self.networks.describe(order)
        steps = self._steps(child.slot, view, order, own_network)
        wall = b"" if layout is None else self.networks.wall_for(layout)
        has_init = order is not None and order.init
        child.layout, child.wall = layout, wall
        wanted = ChildRequest(child.slot, child.index, steps, layout, wall, has_init)
        again = partial(self._make_again, child, order, view, on_made, tried)
        done = partial(self._on_answer, child, on_made, again)
        self.forks.call("make", (wanted,), done, repeat=False)

    def _on_answer(
        self,
        child: Child,
        on_made: OnMade,
        again: Callable[[], None],
        answer: Message,
        descriptors: list[int],
    ) -> None:
        pid, named = answer.get("pid"), answer.get("descriptors")
        if isinstance(pid, int) and isinstance(named, list):
            made = descriptors_of(named, descriptors)
            child.pid, child.pidfd, child.order = pid, made.pidfd, made.order
            child.stdout, child.stderr = made.stdout, made.stderr
            child.sock, child.report = socket.socket(fileno=made.sock), made.report
            child.gateway = made.gateway if made.gateway >= 0 else None
            oom = made.oom if made.oom >= 0 else None
            child.scope = self._tree.adopt(child.slot.name, made.scope, oom)
            on_made(None)
            return
        gateway = answer.pop("gateway_pid", None)
        if isinstance(gateway, int):
            self.forks.end(gateway)
        if answer.get("errno") == DIED and not child.doomed:
            again()
        else:
            on_made(answer)

    def _make_again(
        self, child: Child, order: Order | None, view: RootView, on_made: OnMade, tried: int
    ) -> None:
        """Ask for a child again, in place of one that was lost when the fork server ended.

        The child gets a new name, and the scope of the old name is killed and removed.
        """
        if tried >= TRIES:
            on_made({"errno": DIED, "detail": "the fork server has ended each time"})
            return
        left = child.slot.name
        self.scopes.kill(left)
        self.scopes.remove(left, lambda: None)
        child.slot = self._new_slot(child.index)
        child.scope = self._tree.adopt(child.slot.name)
        try:
            self._ask_for(child, order, view, on_made, tried + 1)
        except (OSError, SandboxError) as error:
            on_made({"errno": getattr(error, "errno", None) or errno.EIO, "detail": str(error)})

    def plan(self, order: Order, limits: ScopeLimits) -> list[tuple[str, str, str]]:
        """A description of each step by which `order` would be started.

        Raises SandboxError like `make`.
        """
        self._tree.check_controllers(limits)
        own_network, _ = self.networks.describe(order)
        slot = Slot("job", self._ids.first_of(0), self._ids.each)
        view = self._stage.view_for(order)
        images = [self.volumes.path(name) for name, _ in order.volumes]
        steps = self._steps(slot, _with_volumes(view, order, images), order, own_network)
        return [explain(step) for step in (*steps, *finish(order))]

    def _steps(
        self, slot: Slot, view: RootView, order: Order | None, own_network: OwnNetwork | None
    ) -> tuple[Step, ...]:
        disk = (order.disk_bytes if order else 0) or self._policy.disk_bytes
        sizes = Sizes(rounded(disk), self._policy.tmpfs_bytes, self._terminals)
        return prepare(ROOT, view, slot, sizes, order, own_network)

    # --- clearing ---------------------------------------------------------------------------

    def discard_disk(self, child: Child) -> None:
        """Have a process discard the disk of a child that has ended."""
        disk, root = child.disk, child.root
        if disk is not None:
            child.disk = child.root = None  # first, since a retry may call this a second time
            self.sweepers.discard_disk(disk, root, shared=child.shares)

    def clear(self, child: Child, done: Callable[[], None]) -> None:
        """Release all that an ended child had except for its pipes, and then call `done`.

        What must hold: its gateway has been reaped.
        """
        self.scopes.remove(child.scope.name, partial(self._on_removed, child, done))

    def _on_removed(self, child: Child, done: Callable[[], None]) -> None:
        child.scope.close()
        if child.sock is not None:
            child.sock.close()
            child.sock = None
        close_all([child.pidfd, child.order, child.report])
        child.pidfd = child.order = child.report = -1
        if self._stage.view.scratch:
            self.sweepers.remove(f"{self._stage.view.scratch}/{child.slot.name}")
        self._free.append(child.index)
        self.event_loop.call_with_retries(done)

    def release_volumes(self, child: Child) -> None:
        """End a child's use of its volumes, so that they may be removed."""
        roots, child.volume_roots = list(child.volume_roots.values()), {}
        volumes, child.volumes = child.volumes, ()
        self.volumes.release(volumes)
        self.sweepers.close(roots)

    def close_pipes(self, child: Child) -> None:
        """Close a child's pipes. Output that was not read is lost."""
        close_all([child.stdout, child.stderr])
        child.stdout = child.stderr = -1

    def sweep_scratch(self) -> None:
        """Have a process remove what an earlier launcher left on disk."""
        for path in self._stage.left_over():
            self.sweepers.remove(path)


def _with_volumes(view: RootView, order: Order, images: Sequence[str]) -> RootView:
    found = ((name, image, at) for (name, at), image in zip(order.volumes, images, strict=True))
    return view._replace(volumes=tuple(found))
