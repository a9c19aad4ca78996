"""Telling whoever started the service how it stands: the protocol of sd_notify(3).

systemd listens, and so do `worker demo` and the tests, which need to know the port.
"""

import os
import socket

import trio

from jobworker.sd_notify import AGAIN_SECONDS, PATIENCE_SECONDS, Outcome, try_to_send

ADDRESS_FIELD = "X_JOBWORKER_ADDRESS"
"""A field of our own (names that begin with X_ are free): HOST:PORT of the listener."""


class Notifier:
    """A datagram socket to NOTIFY_SOCKET; without that variable it says nothing."""

    def __init__(self) -> None:
        path = os.environ.pop("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        self._telling = trio.Lock()
        self.watchdog_seconds = _watchdog_seconds()
        """How often somebody wants to hear that the service is alive, by `tell_alive`; or never."""
        self.fault = ""
        """Why nobody can be told, though somebody wants to be; else ""."""
        if path:
            # Connected at once: later the path may be out of the service's reach.
            notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                notify.connect("\0" + path[1:] if path.startswith("@") else path)
            except (OSError, ValueError) as error:  # a stale one; one that is too long, or has NULs
                notify.close()
                reason = error.strerror if isinstance(error, OSError) else None
                self.fault = (
                    f"cannot tell the supervisor at NOTIFY_SOCKET {path[:200]!r} how the service "
                    f"stands: {reason or error}"
                )
            else:
                self._socket = notify

    @property
    def descriptor(self) -> int | None:
        """The socket's own, for a process that goes on in this one's place."""
        return None if self._socket is None else self._socket.fileno()

    async def tell(self, **fields: str) -> None:
        """Send fields such as READY="1"; a listener that is gone is no fault of ours.

        Where it has no room for them, this waits up to PATIENCE_SECONDS, and those that are told
        next wait behind: they may say the opposite.
        """
        message = "\n".join(f"{name}={value}" for name, value in fields.items())
        async with self._telling:
            with trio.move_on_after(PATIENCE_SECONDS):
                while True:
                    if self._is_done_with(message):
                        return
                    await trio.sleep(AGAIN_SECONDS)

    def tell_alive(self) -> None:
        """Send WATCHDOG="1" if there is room for it: the next one follows soon."""
        self._is_done_with("WATCHDOG=1")

    def _is_done_with(self, message: str) -> bool:
        """Send a message where there is room; whether there is no more to do about it."""
        if self._socket is None:
            return True
        outcome = try_to_send(self._socket, message)
        if outcome is Outcome.NOBODY_LISTENS:
            self._socket.close()
            self._socket = None
        return outcome is not Outcome.NO_ROOM


def _watchdog_seconds() -> float | None:
    """WatchdogSec= of the unit, where it is meant for this process: sd_watchdog_enabled(3)."""
    period, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    if not period.isascii() or not period.isdigit() or pid not in ("", str(os.getpid())):
        return None
    return int(period) / 1e6
