"""Gives a child its order, by which it becomes a job: first its limits and its host name.

Most jobs ask for the limits of the job before, and for a host name whose number is one higher. So a
spare gets both in advance, and its order then costs little.

Standard library only.
"""

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


class Orders:
    """Sends orders, and kills a child whose order cannot be sent."""

    def __init__(self, pool: ChildPool, kill: Callable[[Child], None]) -> None:
        self._host_names, self._kill = pool.host_names, kill
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
            names.set(child.pidfd, request.order.hostname, partial(self._on_named, child, start))
        except Exception:
            self._kill(child)
            raise

    def _on_named(self, child: Child, start: PendingStart, outcome: channel.Message) -> None:
        """Send a child its order, unless it was killed or has ended while its name was set.

        It may also end now. Then its own message, read at its end, has the reason.
        """
        if child.doomed:
            return
        try:
            if "errno" in outcome:
                code = outcome["errno"]
                assert isinstance(code, int)
                raise OSError(code, f"cannot set the host name: {os.strerror(code)}")
            child.send(start.exec_image)
        except OSError as error:
            if not isinstance(error, _ENDED):
                child.failure = child.failure or problem(SPAWN.step, error)
            self._kill(child)
