"""Sends the messages of one connection, each whole or not at all, and ends the conversation.

A message that is cut off breaks the stream (`tls_stream`), so the end of a subscription does not
cancel a message that is being sent: otherwise it would end the connection. Only the end of the
connection cancels it, or a client that takes nothing for too long.
"""

import logging
from collections.abc import Sequence

import trio
from attrs import define, field
from trio_websocket import ConnectionClosed

from jobworker.errors import CertificateRefused, JobworkerError, SendStalled, ShuttingDown
from jobworker.protocol.closing import GOING_AWAY, REFUSED, TRY_AGAIN
from jobworker.protocol.frames import Frame, closing_reason, frame_text
from jobworker.server.access.connected_clients import ConnectedClient
from jobworker.server.connections.framed_socket import FramedSocket
from jobworker.server.fairness.connection_limiter import ConnectionLimiter

log = logging.getLogger("jobworker.server")

DISMISSAL_SECONDS = 0.3
"""The time for a dismissed client to take the messages on their way, and then again to take the
closing frame with the reason."""


@define(eq=False)
class Sender:
    """The server's way to send to one client, until the conversation ends."""

    _socket: FramedSocket
    _client: ConnectedClient
    _limiter: ConnectionLimiter
    scope: trio.CancelScope = field(factory=trio.CancelScope, init=False)
    """The scope of the conversation's tasks, except those that serve calls."""
    _sends: set[trio.CancelScope] = field(factory=set, init=False)
    """A shielded scope for each message that is being sent, since messages are sent whole."""
    _fault: JobworkerError | None = field(default=None, init=False)
    """Why the server ends the connection, if the client reached a limit."""
    _leaving: bool = field(default=False, init=False)
    _quiet: trio.Event = field(factory=trio.Event, init=False)
    """Set once no message is being sent any more to a client that has to leave."""

    async def send(self, message: str | Sequence[Frame]) -> None:
        """Send a message or several, each whole or not at all.

        The conversation ends if the client takes nothing for too long.
        """
        if self._leaving:
            await trio.sleep_forever()  # until the connection has ended
        sent = False
        with trio.CancelScope(shield=True) as right:
            self._sends.add(right)
            try:
                frames = [frame_text(message)] if isinstance(message, str) else message
                await self._socket.send_frames(frames)
                sent = True
            except SendStalled as stalled:
                self.end(stalled)
            except (trio.BrokenResourceError, trio.ClosedResourceError, ConnectionClosed) as broken:
                log.debug("%s: cannot send: %r", self._client.peer, broken)
                self.cancel()
            finally:
                self._sends.discard(right)
                if not self._sends:
                    self._quiet.set()
        await trio.lowlevel.checkpoint_if_cancelled()
        if not sent:
            await trio.sleep_forever()  # until the conversation's end cancels this task

    def end(self, fault: JobworkerError) -> None:
        """End the conversation, since the client reached a limit. `say_goodbye` sends the error."""
        if not self.scope.cancel_called:
            self._fault = fault
            self.record_limit(fault)
            self.cancel()

    def record_limit(self, error: JobworkerError) -> None:
        """Record that the client reached a limit."""
        self._limiter.record_limit(
            f"{self._client.peer} ({self._client.identity.common_name})", error
        )

    def cancel(self) -> None:
        """End the conversation, and cancel each message that is being sent, also by the reader."""
        self.scope.cancel()
        self._cancel_sends()

    def stop(self) -> None:
        """Send nothing more, and cancel each message that is being sent."""
        self._leaving = True
        self._cancel_sends()

    def _cancel_sends(self) -> None:
        for send in tuple(self._sends):
            send.cancel()

    async def finish(self) -> None:
        """Send nothing more, and wait up to `DISMISSAL_SECONDS` for messages on their way.

        If such a message were cut off, the stream would break, and the client could not get the
        closing frame.
        """
        self._leaving, self._quiet = True, trio.Event()
        if self._sends:
            with trio.move_on_after(DISMISSAL_SECONDS):
                await self._quiet.wait()

    async def say_goodbye(self) -> bool:
        """Send a closing frame. Returns whether the client answered it in `DISMISSAL_SECONDS`.

        The frame's code says whether the client may connect again, and its reason says why. After
        its answer a client sends nothing more.

        A client that closed first, or broke the connection, gets no frame. A client whose answer
        comes late still gets the frame, since the connection lingers.
        """
        if self._fault is not None:
            code, reason = TRY_AGAIN, f"{self._fault.name}: {self._fault.message}"
        elif self._client.reason:
            code, reason = REFUSED, f"{CertificateRefused.name}: {self._client.reason}"
        else:
            code, reason = GOING_AWAY, f"{ShuttingDown.name}: the service ends; connect again"
        if self._socket.closed is not None:
            return False
        with trio.move_on_after(DISMISSAL_SECONDS, shield=True) as bound:
            await self._socket.aclose(code, closing_reason(reason))
        return not bound.cancelled_caught
