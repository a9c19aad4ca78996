"""One connection's calls and subscriptions: match replies to calls, and output to subscriptions.

Four tasks serve a connection. The task of `dial.serve_connection` keeps it open. The watch gives it
up if the server is silent while something waits (`silence`). The reader passes each reply to the
call with its id, and each piece of output to its subscription. The writer alone sends messages, so
a request is sent whole or not at all, even if its call is cancelled. If the writer has not begun to
send it, a cancelled call's request is dropped. Otherwise the request is sent, its reply is dropped,
and a subscription that the reply opens is ended.

Output may arrive before the task that asked for it runs. So the reader itself opens the inbox of a
subscription at the first message with its number. Numbers grow: a number below the highest without
an inbox belongs to a subscription that the client has closed.

Once the connection is lost, every waiting or later call raises LinkLost, with the reason and
whether the server may have the request. If the server has closed the connection because of a
message's size (1009), the call with the largest request gets MessageTooLarge instead: its retry
would break connection after connection.
"""

from collections import deque
from collections.abc import Callable
from typing import TypeVar

import trio
from attrs import define, field

from jobworker.client.dial import Connection
from jobworker.client.following import Following, Inbox, copied
from jobworker.client.silence import TICK_SECONDS, Silence
from jobworker.errors import ConnectionFailed, JobworkerError, MessageTooLarge, ProtocolError
from jobworker.protocol import messages as m
from jobworker.protocol.session import CallId, ClientSession, Output, Reply

T = TypeVar("T")


def _ignore(_: bool) -> None:
    pass


WORD_SECONDS = 1.0
"""After a failed send, how long the reader goes on: the server's closing frame may arrive."""


class RpcConnectionLost(Exception):
    """The connection was lost before the reply to a call arrived."""

    def __init__(
        self, reason: JobworkerError, *, sent: bool, size: int, broke: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.size = reason, size
        self.sent = sent
        """False if the server certainly does not have the whole request."""
        self.broke = broke
        """Whether sending had begun, and the server had not announced its end."""


@define(eq=False)
class _Pending:
    """A call that waits for its reply."""

    id: CallId
    size: int
    """Size of the request in bytes."""
    answered: trio.Event = field(factory=trio.Event)
    reply: Reply | JobworkerError | RpcConnectionLost | None = None
    on_sent: Callable[[bool], None] = _ignore
    """Called with `sent` when that changes."""
    begun: bool = False
    """Whether the writer has begun to send it."""
    sent: bool = False
    """Whether the server may have the whole request."""
    abandoned: bool = False
    """Whether the call was cancelled."""

    def answer(self, reply: Reply | JobworkerError | RpcConnectionLost) -> None:
        if self.reply is None:  # the connection may be lost before the caller has seen its reply
            self.reply = reply
            self.answered.set()


@define(eq=False)
class RpcConnection:
    """Calls over one connection, any number at a time."""

    connection: Connection
    lost: trio.Event = field(factory=trio.Event, init=False)
    failure: JobworkerError | None = field(default=None, init=False)
    """Why the connection was lost; None while it is open."""
    _session: ClientSession = field(factory=ClientSession, init=False)
    _pending: dict[CallId, _Pending] = field(factory=dict, init=False)
    """Calls without a reply, cancelled ones included."""
    _inboxes: dict[int, Inbox] = field(factory=dict, init=False)
    _awaited: trio.lowlevel.ParkingLot = field(factory=trio.lowlevel.ParkingLot, init=False)
    """Here the watch waits while nothing waits for the server."""
    _highest_subscription: int = field(default=0, init=False)
    _dropped: deque[int] = field(factory=deque, init=False)
    """Subscriptions whose Following was deleted without `close`; filled by garbage collection."""
    _outgoing: trio.MemorySendChannel[tuple[str, _Pending | None]] = field(init=False)
    _to_send: trio.MemoryReceiveChannel[tuple[str, _Pending | None]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        # Unbounded, because each call in it has a task that waits for its reply.
        self._outgoing, self._to_send = trio.open_memory_channel[tuple[str, _Pending | None]](
            float("inf")
        )

    async def call(
        self,
        name: str,
        params: object,
        result: type[T],
        on_sent: Callable[[bool], None] = _ignore,
    ) -> T:
        """Call a method and wait for its result. Raises the server's error, and LinkLost.

        `on_sent` is called with whether the server may have the request, first when it is sent.
        """
        await trio.lowlevel.checkpoint_if_cancelled()  # before the request is queued
        id_, message = self._session.call(name, params)
        size = len(message.encode())
        if self.failure is not None:
            raise RpcConnectionLost(copied(self.failure), sent=False, size=size)
        pending = self._pending[id_] = _Pending(id_, size, on_sent=on_sent)
        self._outgoing.send_nowait((message, pending))
        self._awaited.unpark_all()
        try:
            await pending.answered.wait()
        except trio.Cancelled:
            if isinstance(pending.reply, Reply):  # the reply arrived in the same turn
                self._abandon(pending.reply)
            pending.abandoned = True
            raise
        reply = pending.reply
        if isinstance(reply, JobworkerError | RpcConnectionLost):
            raise reply
        assert reply is not None
        if reply.error is not None:
            raise reply.error
        assert isinstance(reply.result, result)
        return reply.result

    def following(
        self, subscription: int | None, offset: int, starts: tuple[m.StreamStart, ...] = ()
    ) -> Following:
        """Return the output of a subscription that a call has just opened."""
        inbox = None if subscription is None else self._inboxes.get(subscription)
        if subscription is None or inbox is None:
            raise ProtocolError("cannot follow the job: the server opened no subscription")
        return Following(
            offset=offset,
            starts=starts,
            inbox=inbox,
            grant=lambda count: self._grant(subscription, count),
            forget=lambda ended: self._forget(subscription, ended=ended),
            drop=lambda: self._dropped.append(subscription),
        )

    def _grant(self, subscription: int, count: int) -> None:
        self._notify("job.credit", m.CreditParams(subscription=subscription, bytes=count))

    def _forget(self, subscription: int, *, ended: bool = False) -> None:
        self._inboxes.pop(subscription, None)
        if not ended:
            self._notify("job.unfollow", m.SubscriptionParams(subscription=subscription))

    def _notify(self, name: str, params: object) -> None:
        if self.failure is None:
            self._outgoing.send_nowait((self._session.notify(name, params), None))

    # --- the connection's tasks -------------------------------------------------------------

    async def serve_writer(self) -> None:
        """Send the queued messages of calls, until the connection is lost."""
        async for message, pending in self._to_send:
            if pending is not None:
                if pending.abandoned:
                    self._session.forget(pending.id)
                    self._pending.pop(pending.id, None)
                    continue
                # Set before the send: the connection may be lost when all but the end is sent.
                pending.begun = pending.sent = True
                pending.on_sent(True)
            try:
                await self.connection.send(message)
            except JobworkerError as lost:
                if pending is not None:
                    pending.sent = False  # `send` raises only if the message is not sent whole
                    pending.on_sent(False)
                with trio.move_on_after(WORD_SECONDS):
                    await self.lost.wait()
                self.lose(lost)
                return

    async def serve_reader(self) -> None:
        """Pass messages to their calls and subscriptions, until the connection is lost."""
        try:
            while True:
                self._dispatch(self._session.receive(await self.connection.receive()))
                while self._dropped:
                    self._forget(self._dropped.popleft())
        except JobworkerError as lost:
            self.lose(lost)

    async def serve_watch(self) -> None:
        """Lose the connection once the server is silent while calls or subscriptions wait."""
        silence = Silence(self.connection.traffic)

        async def ping() -> None:
            await self.connection.ping()
            silence.ping_sent(self.connection.traffic.sent_bytes)

        async with trio.open_nursery() as nursery:
            while not silence.is_over_the_bound:
                while not self._awaits_server:
                    await self._awaited.park()
                await trio.sleep(TICK_SECONDS)
                if silence.tick(self.connection.traffic):
                    nursery.start_soon(ping)  # it may wait behind a long request
            nursery.cancel_scope.cancel()
        self.lose(self.connection.silent(silence.seconds))

    @property
    def _awaits_server(self) -> bool:
        waiting = (True for pending in self._pending.values() if not pending.abandoned)
        return bool(self._inboxes) or any(waiting)

    def _dispatch(self, received: Reply | Output | m.OutputEnd | None) -> None:
        match received:
            case Reply():
                pending = self._pending.pop(received.id, None)
                subscription = m.opened_by(received.result)
                if subscription is not None:
                    self._inbox(subscription)
                if pending is None or pending.abandoned:
                    self._abandon(received)
                else:
                    pending.answer(received)
            case Output():
                self._deliver(received.header.subscription, received)
            case m.OutputEnd():
                self._deliver(received.subscription, received)

    def _deliver(self, subscription: int, item: Output | m.OutputEnd) -> None:
        inbox = self._inbox(subscription)
        if inbox is not None:
            inbox.put(item)

    def _inbox(self, subscription: int) -> Inbox | None:
        if subscription > self._highest_subscription:
            self._highest_subscription = subscription
            self._inboxes[subscription] = Inbox.make()
        return self._inboxes.get(subscription)

    def _abandon(self, reply: Reply) -> None:
        """End the subscription that the reply to a cancelled call has opened."""
        subscription = m.opened_by(reply.result)
        if subscription is not None:
            self._forget(subscription)

    def lose(self, error: JobworkerError) -> None:
        """Mark the connection as lost for this reason.

        Fails all calls, and passes the error to all subscriptions. Idempotent.
        """
        if self.failure is not None:
            return
        if isinstance(error, MessageTooLarge):
            self._refuse_largest(error)
            error = ConnectionFailed(
                f"cannot go on: the connection ended for a message's size: {error.message}",
                remedy="connect again",
            )
        self.failure = error
        for pending in self._pending.values():
            broke = pending.begun and not self.connection.is_ended
            reason = RpcConnectionLost(
                copied(error), sent=pending.sent, size=pending.size, broke=broke
            )
            pending.answer(reason)
        for inbox in self._inboxes.values():
            inbox.put(error)
        self.lost.set()

    def _refuse_largest(self, refusal: MessageTooLarge) -> None:
        """Fail the call with the largest request: it is the one that was too large, or larger.

        The server has closed the connection at the first message above its bound, so the largest
        request is above the bound in any case.
        """
        largest = max(self._pending.values(), key=lambda pending: pending.size, default=None)
        if largest is not None:
            largest.answer(
                MessageTooLarge(
                    f"cannot send the request: it has {largest.size} bytes as JSON, more than the "
                    f"server allows in one message ({refusal.message}); it was not executed",
                    remedy="send a smaller request, or raise limits.max_message_bytes there",
                )
            )
