"""The launcher's children: which of them are jobs, and which are being removed.

A child is here from the request for it until its slot is free. A job is here by its id until it is
removed, or until its start has failed. So a job that has ended keeps its exit status and its pipes
until the service asks to `remove` it, while the launcher releases the rest (`launcher.ends`).

What must hold: the call that removes a job is answered when the job's slot is free. A program that
may have run is never among the `unstarted`: the next service may start those jobs again.

Standard library only.
"""

import contextlib
import signal
from collections.abc import Callable, Collection

from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.launcher.child import Child, PendingStart
from jobworker.sandbox.launcher.children import ChildPool

UNSTARTED_KEPT = 1000
"""How many starts the launcher remembers: their ids fit in one packet with a page of jobs."""


class Jobs:
    """All children of the launcher."""

    def __init__(self, pool: ChildPool) -> None:
        self._pool = pool
        self._children: set[Child] = set()
        self._jobs: dict[int, Child] = {}
        self._unstarted: dict[int, None] = {}
        """Jobs whose start was requested and whose program has certainly not run."""
        self._untold: set[Child] = set()
        """Cleared children whose `when_cleared` has not returned yet."""

    @property
    def children(self) -> Collection[Child]:
        """All children whose slots are not free: spares, starts and jobs."""
        return self._children

    @property
    def count(self) -> int:
        """How many jobs there are, those included that start or have ended."""
        return len(self._jobs)

    @property
    def nothing_left(self) -> bool:
        """Whether all children are cleared away, and all removal of their resources is done."""
        return not self._children and self._pool.is_idle

    def find(self, job: int) -> Child | None:
        """The child that is this job, or None if there is none."""
        return self._jobs.get(job)

    def started_after(self, job: int) -> list[Child]:
        """The jobs with higher ids whose program was started, in the order of their ids.

        Jobs that have ended are included.
        """
        return [
            child
            for number, child in sorted(self._jobs.items())
            if number > job and child.request is None
        ]

    def running(self) -> dict[int, Child]:
        """The jobs and starts that have a process that has not ended, by their ids."""
        return {job: child for job, child in self._jobs.items() if child.is_alive}

    def promised_bytes(self) -> int:
        """The bytes of the host's disk that jobs' disks may still take.

        Counts the disks of jobs and spares, if they are overcommitted, and jobs' thin volumes.
        """
        disks = [
            child.disk.root
            for child in self._children
            if child.disk is not None and self._pool.overcommits
        ]
        thin = {
            name: root
            for child in self._children
            for name, root in child.volume_roots.items()
            if name in child.thin_volumes
        }
        return sum(disk_images.may_still_take(root) for root in (*disks, *thin.values()))

    # --- starts -----------------------------------------------------------------------------

    @property
    def unstarted(self) -> list[int]:
        """The latest jobs whose start was requested and whose program was not executed."""
        return list(self._unstarted)

    def remember_unstarted(self, job: int) -> None:
        """Record that a job's start was requested. Only the latest `UNSTARTED_KEPT` are kept."""
        self._unstarted.pop(job, None)
        self._unstarted[job] = None
        if len(self._unstarted) > UNSTARTED_KEPT:
            del self._unstarted[next(iter(self._unstarted))]

    def forget_unstarted(self, job: int) -> None:
        """Record that a job's program runs or may have run."""
        self._unstarted.pop(job, None)

    def add(self, child: Child) -> None:
        """Take a child that the fork server was asked for."""
        self._children.add(child)

    def become(self, child: Child, start: PendingStart) -> None:
        """Record which job a child is to become, and the request that its start answers."""
        job = start.request.job
        self._jobs[job] = child
        child.job, child.request, child.start_by = job, start.number, start.by

    # --- the end ----------------------------------------------------------------------------

    def kill(self, child: Child) -> None:
        """Send SIGKILL to all processes of a child, unless its first process has ended."""
        if child.exit is not None:
            return
        child.doomed = child.was_killed = True
        if child.pidfd >= 0:  # else it is killed as soon as it is made
            # When the first process dies, the kernel kills its PID namespace. The kill of the
            # scope also reaches processes that have not entered that namespace yet.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            self._pool.scopes.kill(child.scope.name)

    def remove(self, child: Child, done: Callable[[], None] | None = None) -> None:
        """Kill a job if it has not ended, and forget it.

        `done` is called when the job's slot is free: the service may then start the next job.
        """
        child.when_cleared = done or child.when_cleared
        self.forget(child)
        if child.exit is None:  # it is cleared away when it has ended
            self.kill(child)
        elif child not in self._children:
            self.tell_cleared(child)

    def remove_all(self) -> None:
        """Kill every child and forget every job."""
        for child in [*self._children, *self._jobs.values()]:
            self.remove(child)

    def forget(self, child: Child) -> None:
        """Drop a job's id and exit status, and close its pipes."""
        if child.job is not None:
            self._jobs.pop(child.job, None)
            child.job = None
        self._pool.close_pipes(child)

    def discard(self, child: Child) -> None:
        """Drop a child whose slot is free. `tell_cleared` is to be called for it."""
        self._children.discard(child)
        self._untold.add(child)

    def tell_cleared(self, child: Child) -> None:
        """Call the child's `when_cleared`, since nothing of it is left but its pipes."""
        if child.when_cleared is not None:
            child.when_cleared()
            child.when_cleared = None
        self._untold.discard(child)

    def forget_listeners(self) -> None:
        """Call no `when_cleared` that was set so far: the service that waits for it has gone."""
        for child in self._untold:
            child.when_cleared = child.request = None
        self._untold.clear()
        for child in self._children:
            child.when_cleared = None
