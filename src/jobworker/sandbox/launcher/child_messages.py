"""Reads what a child says on its socket until it executes the job's program or ends.

A child sends descriptors of what it has made, that it is ready for its order, or why it has failed.
execve(2) closes the child's end of the socket. So the end of the stream means that the program
runs, if the child was ready and had its order.

Standard library only.
"""

from collections.abc import Callable

from jobworker.errors import ProtocolError
from jobworker.sandbox import channel
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.orders import Orders
from jobworker.sandbox.launcher.reports import DIED, TOO_FEW_DESCRIPTORS
from jobworker.sandbox.launcher.spares import Spares
from jobworker.sandbox.launcher.sweepers import Sweepers


class ChildMessages:
    """Reads children's sockets. `on_started` is called for each child whose program runs."""

    def __init__(
        self,
        event_loop: EventLoop,
        sweepers: Sweepers,
        spares: Spares,
        orders: Orders,
        kill: Callable[[Child], None],
        on_started: Callable[[Child], None],
    ) -> None:
        self._event_loop, self._sweepers = event_loop, sweepers
        self._spares, self._orders = spares, orders
        self._kill, self._on_started = kill, on_started

    def read(self, child: Child) -> None:
        """Read a child's socket: it has messages, or its end (execve(2) or the child's death)."""
        assert child.sock is not None
        try:
            while (message := child.hear()) is not None:
                failure = message.get("failed")
                if isinstance(failure, dict):
                    child.failure = failure
                elif "ready" in message:
                    child.ready = True
                    if child in self._spares:
                        self._orders.give_ahead(child)
        except BlockingIOError:
            if child.exit is None:
                return
        except (ProtocolError, OSError) as error:
            cut = isinstance(error, channel.DescriptorsLost)
            child.failure = child.failure or (TOO_FEW_DESCRIPTORS if cut else DIED)
            self._kill(child)  # it may have its order already, and would execute its program
            if isinstance(error, channel.BadMessage):
                self._sweepers.close(error.descriptors)
        if not child.ready or child.order >= 0:  # it had no order, so it cannot have executed
            child.failure = child.failure or DIED
        self._event_loop.unwatch(child.sock.fileno())
        child.sock.close()
        child.sock = None
        self._spares.discard(child)
        if child.failure is None and child.job is not None and child.request is not None:
            self._on_started(child)
