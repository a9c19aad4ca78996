"""Gives a child its order, by which it becomes a job: first its limits and its host name.

Most jobs ask for the limits of the job before, and for a host name whose number is one higher. So a
spare gets both in advance, and its order then costs little.

Standard library only.
"""

import errno
import os
from collections.abc import Callable
from functools import partial

from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits
from jobworker.sandbox.launcher.child import Child, PendingStart
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.host_names import following
from jobworker.sandbox.launcher.reports import problem
from jobworker.sandbox.network.modes import room_beside
from jobworker.sandbox.protocol.operations import SPAWN

_ENDED = (ProcessLookupError, BrokenPipeError, ConnectionResetError)
"""The errors of a call for a child that has just ended."""

NAME_AGAIN_SECONDS = 0.005


class Orders:
    """Sends orders, and kills a child whose order cannot be sent."""

    def __init__(self, pool: ChildPool, kill: Callable[[Child], None]) -> None:
        self._event_loop, self._host_names, self._kill = pool.event_loop, pool.host_names, kill
        self._usual_limits = ScopeLimits()
        """The limits of the latest job. Spares get them in advance: most jobs ask for the same."""

    def give_ahead(self, spare: Child) -> None:
        """Give a spare the limits and the host name that the next start is likely to ask for."""
        spare.scope.arm_ahead(self._usual_limits)
        self._host_names.name_ahead(spare)

    def give(self, child: Child, start: PendingStart) -> None:
        """Set a child's limits and send it its order.

        If it does not have its host name yet, it first gets that, and `_on_named` sends the order.
        If that fails, the child is killed, then cleared like any other, and the error is raised.
        """
        request, names = start.request, self._host_names
        try:
            child.scope.arm(room_beside(request.limits, request.order))
            self._usual_limits = request.limits
            if child.host_name == request.order.hostname:
                child.send(start.exec_image)
                return
            names.next = following(request.order.hostname)
            self._name(child, start)
        except Exception:
            self._kill(child)
            raise

    def _name(self, child: Child, start: PendingStart) -> None:
        on_named = partial(self._on_named, child, start)
        self._host_names.set(child.pidfd, start.request.order.hostname, on_named)

    def _name_again(self, child: Child, start: PendingStart) -> None:
        if child.doomed:
            return
        try:
            self._name(child, start)
        except OSError as error:
            self._fail(child, error)

    def _on_named(self, child: Child, start: PendingStart, outcome: channel.Message) -> None:
        """Send a child its order, unless it was killed or has ended while its name was set.

        It may also end now. Then its own message, read at its end, has the reason. Once it has
        changed its ids, and until it has executed the trampoline, an ordinary user's launcher may
        not enter its namespace (EPERM, ptrace(2)): this tries again.
        """
        if child.doomed:
            return
        if outcome.get("errno") == errno.EPERM and not child.ready:
            again = partial(self._name_again, child, start)
            self._event_loop.call_later(NAME_AGAIN_SECONDS, again)
            return
        try:
            if "errno" in outcome:
                code = outcome["errno"]
                assert isinstance(code, int)
                raise OSError(code, f"cannot set the host name: {os.strerror(code)}")
            child.send(start.exec_image)
        except OSError as error:
            self._fail(child, error)

    def _fail(self, child: Child, error: OSError) -> None:
        if not isinstance(error, _ENDED):
            child.failure = child.failure or problem(SPAWN.step, error)
        self._kill(child)
