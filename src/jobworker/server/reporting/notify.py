"""Status messages to the process that started the service: the protocol of sd_notify(3).

systemd reads them, and so do `worker demo` and the tests, which need the port.
"""

import os
import socket

import trio

from jobworker.sd_notify import AGAIN_SECONDS, PATIENCE_SECONDS, Outcome, try_to_send

ADDRESS_FIELD = "X_JOBWORKER_ADDRESS"
"""A field of our own (names that begin with X_ are free): HOST:PORT of the listener."""


class Notifier:
    """Sends datagrams to the supervisor at NOTIFY_SOCKET; without that variable it sends none."""

    def __init__(self) -> None:
        path = os.environ.pop("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        self._telling = trio.Lock()
        self.watchdog_seconds = _watchdog_seconds()
        """The longest time between two calls of `notify_watchdog`; None if there is no watchdog."""
        self.fault = ""
        """Why no message can be sent, though NOTIFY_SOCKET is set; else ""."""
        if path:
            # It connects here, since the unprivileged service may not reach the path later.
            notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                notify.connect("\0" + path[1:] if path.startswith("@") else path)
            except (OSError, ValueError) as error:  # stale, or a path that is too long or has NULs
                notify.close()
                reason = error.strerror if isinstance(error, OSError) else None
                self.fault = (
                    f"cannot send the service's status to NOTIFY_SOCKET {path[:200]!r}: "
                    f"{reason or error}"
                )
            else:
                self._socket = notify

    @property
    def descriptor(self) -> int | None:
        """The socket's descriptor. `worker launcher` hands it to the launcher that it becomes."""
        return None if self._socket is None else self._socket.fileno()

    async def notify(self, **fields: str) -> None:
        """Send fields such as READY="1"; a supervisor that is gone is no error.

        If its queue has no room, this waits up to PATIENCE_SECONDS. Later messages wait behind this
        one, since they may revoke it.
        """
        message = "\n".join(f"{name}={value}" for name, value in fields.items())
        async with self._telling:
            with trio.move_on_after(PATIENCE_SECONDS):
                while True:
                    if self._is_done_with(message):
                        return
                    await trio.sleep(AGAIN_SECONDS)

    def notify_watchdog(self) -> None:
        """Send WATCHDOG="1" if there is room; else drop it, since the next one follows soon."""
        self._is_done_with("WATCHDOG=1")

    def _is_done_with(self, message: str) -> bool:
        """Send a message if there is room. Returns False if the caller has to try again."""
        if self._socket is None:
            return True
        outcome = try_to_send(self._socket, message)
        if outcome is Outcome.NOBODY_LISTENS:
            self._socket.close()
            self._socket = None
        return outcome is not Outcome.NO_ROOM


def _watchdog_seconds() -> float | None:
    """WatchdogSec= of the unit in seconds, if it is for this process: sd_watchdog_enabled(3)."""
    period, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    if not period.isascii() or not period.isdigit() or pid not in ("", str(os.getpid())):
        return None
    return int(period) / 1e6
