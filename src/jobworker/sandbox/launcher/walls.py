"""Keeps jobs' private networks away from the host, and reports networks that end before the job.

A wall is the packet filter between a job and its gateway. It closes the host's addresses, so it has
to be replaced when these change.

Standard library only.
"""

import contextlib
import signal
from collections.abc import Collection

from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.reports import Tell
from jobworker.sandbox.log import log_line
from jobworker.sandbox.network.modes import Networks
from jobworker.sandbox.protocol import events
from jobworker.sandbox.start import wall

LOOK_AGAIN_SECONDS = 0.1


class Walls:
    """The walls of all children that have a gateway."""

    def __init__(
        self, event_loop: EventLoop, networks: Networks, children: Collection[Child], tell: Tell
    ) -> None:
        self._event_loop, self._networks, self._children = event_loop, networks, children
        self._tell = tell
        event_loop.watch(networks.changes.fileno(), self._on_addresses)

    def _on_addresses(self) -> None:
        """Rebuild the walls of all started jobs if the host's addresses have changed."""
        try:
            changed = self._networks.refresh()
        except OSError as error:
            log_line(f"cannot see the host's addresses, and tries again: {error}")
            self._event_loop.call_later(LOOK_AGAIN_SECONDS, self._on_addresses)
            return
        if changed:
            for child in self._children:
                if child.sock is None:  # `Starts` builds the wall when a start is done
                    self.build(child)

    def build(self, child: Child) -> None:
        """Have a started job's wall close the host's present addresses.

        If that fails, the job's network ends: its gateway is killed.
        """
        if child.gateway is None or child.layout is None or child.exit is not None:
            return
        program = self._networks.wall_for(child.layout)
        if program == child.wall:
            return
        try:
            wall.build(child.gateway, program)
            child.wall = program
        except ProcessLookupError:
            return  # the gateway has ended, and the job's network with it
        except OSError as error:
            child.network_end = f"the host's new addresses could not be closed to it: {error}"
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.gateway, signal.SIGKILL)

    def tell_end(self, child: Child, how: str) -> None:
        """Report that a job goes on without its network.

        To be called a moment after the end of the network: the job may be ending too.
        """
        if child.exit is None and child.job is not None and not child.doomed:
            why = child.network_end = child.network_end or how
            log_line(f"job {child.job}: its private network ended: {why}")
            self._tell(events.message_of(events.NetworkEnded(child.job, why)), ())
