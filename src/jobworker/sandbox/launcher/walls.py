"""Keeps private networks of jobs away from the host, and tells of those that end before their job.

Standard library only.
"""

import contextlib
import signal
from collections.abc import Collection

from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.told import Tell
from jobworker.sandbox.log import say
from jobworker.sandbox.network.modes import Networks
from jobworker.sandbox.protocol import events
from jobworker.sandbox.start import wall

LOOK_AGAIN_SECONDS = 0.1


class Walls:
    """The walls of all children that have a gateway."""

    def __init__(
        self, turns: Turns, networks: Networks, children: Collection[Child], tell: Tell
    ) -> None:
        self._turns, self._networks, self._children = turns, networks, children
        self._tell = tell
        turns.watch(networks.changes.fileno(), self._on_addresses)

    def _on_addresses(self) -> None:
        """The host has other addresses: close them to the jobs that have a way out."""
        try:
            changed = self._networks.refresh()
        except OSError as error:
            say(f"cannot see the host's addresses, and tries again: {error}")
            self._turns.call_in(LOOK_AGAIN_SECONDS, self._on_addresses)
            return
        if changed:
            for child in self._children:
                if child.sock is None:  # `_on_word` looks after one that is not started yet
                    self.build(child)

    def build(self, child: Child) -> None:
        """Have a started job's wall close what the host answers at now, or end its network."""
        if child.gateway is None or child.layout is None or child.exit is not None:
            return
        program = self._networks.wall_for(child.layout)
        if program == child.wall:
            return
        try:
            wall.build(child.gateway, program)
            child.wall = program
        except ProcessLookupError:
            return  # it has ended, and its network with it
        except OSError as error:
            child.network_end = f"the host's new addresses could not be closed to it: {error}"
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.gateway, signal.SIGKILL)

    def tell_end(self, child: Child, how: str) -> None:
        """Tell that a job goes on without its network; a moment later, since all of it may end."""
        if child.exit is None and child.job is not None and not child.doomed:
            why = child.network_end = child.network_end or how
            say(f"job {child.job}: its private network ended: {why}")
            self._tell(events.message_of(events.NetworkEnded(child.job, why)), ())
