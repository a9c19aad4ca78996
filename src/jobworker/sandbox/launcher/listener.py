"""The listening socket of a launcher that runs on its own: it admits one service at a time.

The socket's file has mode 0600. It belongs to the service's user, or to root if the service gets a
user id of its own after it has connected. The launcher also checks the user of each connection
(SO_PEERCRED, unix(7)): it admits the service's user and root. While a service is connected, the
launcher refuses another one with the reason. When a service has gone, the next one waits until the
launcher has handled all requests of the earlier one.

Standard library only.
"""

import contextlib
import socket
import struct
from collections.abc import Callable, Collection

from jobworker.errors import Busy, JobworkerError, PermissionDenied
from jobworker.sandbox import channel
from jobworker.sandbox.disposal import Disposal
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.log import BoundedLog
from jobworker.sandbox.protocol.greeting import NotReady, message_of

_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid
AGAIN_SECONDS = 0.1


class LauncherListener:
    """The listening socket, and the checks of each connection before it is admitted."""

    def __init__(
        self,
        listener: socket.socket,
        event_loop: EventLoop,
        disposal: Disposal,
        *,
        allowed_uids: Collection[int],
        occupied: Callable[[], bool],
        about_to_be_free: Callable[[], bool],
        admit: Callable[[socket.socket], None],
    ) -> None:
        self._listener, self._event_loop, self._disposal = listener, event_loop, disposal
        self._allowed_uids, self._occupied, self._admit = allowed_uids, occupied, admit
        self._about_to_be_free = about_to_be_free
        self._refusals = BoundedLog()
        listener.setblocking(False)
        event_loop.watch(listener.fileno(), self._on_caller)

    def _on_caller(self) -> None:
        if self._disposal.overloaded or self._about_to_be_free():
            self._pause()
            return
        try:
            caller, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            self._refusals.line(f"cannot accept a service's connection: {error}")
            self._pause()
            return
        caller.setblocking(False)
        try:
            self._check(caller)
        except JobworkerError as error:
            self._refusals.line(error.message)
            word = NotReady(error.code, error.message, error.remedy)
            with contextlib.suppress(OSError):
                channel.send(caller, message_of(word))
            self._disposal.add([caller.detach()])
            return
        self._admit(caller)

    def _check(self, caller: socket.socket) -> None:
        raw = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        uid = _CREDENTIALS.unpack(raw)[1]
        if uid not in self._allowed_uids:
            raise PermissionDenied(
                f"cannot use the launcher: user {uid} is not its service's",
                remedy="set worker.user to the same for both, and start them anew",
            )
        if self._occupied():
            raise Busy(
                "cannot use the launcher: another service is connected to it",
                remedy="stop that service, or give this one a launcher and a state_dir of its own",
            )

    def _pause(self) -> None:
        """Accept no connection for `AGAIN_SECONDS`.

        The launcher has no descriptor left, too many descriptors wait to be closed, or requests of
        the earlier service are still to be read.
        """
        self._event_loop.unwatch(self._listener.fileno())
        self._event_loop.call_later(AGAIN_SECONDS, self._resume)

    def _resume(self) -> None:
        self._event_loop.watch(self._listener.fileno(), self._on_caller)

    def accept_waiting(self) -> None:
        """End a pause at once: all requests of the earlier service have been read."""
        if self._event_loop.is_scheduled(self._resume):
            self._event_loop.call_later(0, self._resume)

    def close(self) -> None:
        """Close the socket, so that no service can connect any more."""
        self._event_loop.cancel(self._resume)
        self._event_loop.unwatch(self._listener.fileno())
        self._listener.close()
