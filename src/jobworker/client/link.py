"""One connection's calls and subscriptions: what is asked meets what is answered.

Three tasks serve a connection. The dialled connection's own reads frames. The reader gives
each reply to the call that waits for it, by id, and each piece of output to its subscription. The
writer alone sends: a call that is cancelled while it waits has its request sent whole or not at
all. One whose sending has not begun is not sent any more; else cancelling abandons only the wait.
What the server then answers is dropped, and a subscription that nobody took is ended.

Output may overtake the task that asked for it. The reader therefore opens a subscription's inbox
itself, when it first hears of its number; numbers grow, so one below the highest that has no inbox
is one that was closed here.

Once the connection is lost, every waiting call and every later one raises LinkLost, which says why
and whether the server may have the request. One whose request was the largest of a connection that
the server closed for a message's size (1009) is refused instead: sent again, it would break
connection after connection.
"""

from collections import deque
from collections.abc import Callable
from typing import TypeVar

import trio
from attrs import define, field

from jobworker.client.dial import Connection
from jobworker.client.following import Following, Inbox, anew
from jobworker.errors import ConnectionFailed, JobworkerError, MessageTooLarge, ProtocolError
from jobworker.protocol import messages as m
from jobworker.protocol.session import CallId, ClientSession, Output, Reply

T = TypeVar("T")


def _nobody_asks(_: bool) -> None:
    pass


WORD_SECONDS = 1.0
"""How long a connection that takes nothing more is read on: the server may say why."""


class LinkLost(Exception):
    """The connection was lost before the call was answered."""

    def __init__(
        self, reason: JobworkerError, *, sent: bool, size: int, broke: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.size = reason, size
        self.sent = sent
        """False where the server certainly does not have the whole request."""
        self.broke = broke
        """Whether sending had begun, and the server did not say that it ends."""


@define(eq=False)
class _Pending:
    """A call that waits for its reply."""

    id: CallId
    size: int
    """Of the request, in bytes."""
    answered: trio.Event = field(factory=trio.Event)
    reply: Reply | JobworkerError | LinkLost | None = None
    tell_sent: Callable[[bool], None] = _nobody_asks
    """Hears of `sent` when that changes."""
    begun: bool = False
    """Whether it is being sent, or was."""
    sent: bool = False
    """Whether the server may have the whole request."""
    abandoned: bool = False
    """Whether the caller has gone."""

    def answer(self, reply: Reply | JobworkerError | LinkLost) -> None:
        if self.reply is None:  # a connection may be lost before the caller has seen its reply
            self.reply = reply
            self.answered.set()


@define(eq=False)
class Link:
    """Calls over one connection, any number at a time."""

    connection: Connection
    lost: trio.Event = field(factory=trio.Event, init=False)
    failure: JobworkerError | None = field(default=None, init=False)
    """Why the connection was lost; None while it is open."""
    _session: ClientSession = field(factory=ClientSession, init=False)
    _pending: dict[CallId, _Pending] = field(factory=dict, init=False)
    """Calls without a reply, those of callers that have gone too."""
    _inboxes: dict[int, Inbox] = field(factory=dict, init=False)
    _highest_subscription: int = field(default=0, init=False)
    _dropped: deque[int] = field(factory=deque, init=False)
    """Subscriptions whose Following went without a word; filled by whoever collects garbage."""
    _outgoing: trio.MemorySendChannel[tuple[str, _Pending | None]] = field(init=False)
    _to_send: trio.MemoryReceiveChannel[tuple[str, _Pending | None]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        # Unbounded: each call in it has a task that waits for its reply.
        self._outgoing, self._to_send = trio.open_memory_channel[tuple[str, _Pending | None]](
            float("inf")
        )

    async def call(
        self,
        name: str,
        params: object,
        result: type[T],
        tell_sent: Callable[[bool], None] = _nobody_asks,
    ) -> T:
        """Call a method and wait for its result. Raises what the server says, and LinkLost.

        `tell_sent` hears whether the server may have the request: not before it is sent.
        """
        await trio.lowlevel.checkpoint_if_cancelled()  # before it is put out
        id_, message = self._session.call(name, params)
        size = len(message.encode())
        if self.failure is not None:
            raise LinkLost(anew(self.failure), sent=False, size=size)
        pending = self._pending[id_] = _Pending(id_, size, tell_sent=tell_sent)
        self._outgoing.send_nowait((message, pending))
        try:
            await pending.answered.wait()
        except trio.Cancelled:
            if isinstance(pending.reply, Reply):  # answered and cancelled at once
                self._abandon(pending.reply)
            pending.abandoned = True
            raise
        reply = pending.reply
        if isinstance(reply, JobworkerError | LinkLost):
            raise reply
        assert reply is not None
        if reply.error is not None:
            raise reply.error
        assert isinstance(reply.result, result)
        return reply.result

    def following(
        self, subscription: int | None, offset: int, starts: tuple[m.StreamStart, ...] = ()
    ) -> Following:
        """The output of a subscription that a call has just opened."""
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
        """Send what calls have put out, until the connection is lost."""
        async for message, pending in self._to_send:
            if pending is not None:
                if pending.abandoned:
                    self._session.forget(pending.id)
                    self._pending.pop(pending.id, None)
                    continue
                # Before: it may be lost while the last of it is under way.
                pending.begun = pending.sent = True
                pending.tell_sent(True)
            try:
                await self.connection.send(message)
            except JobworkerError as lost:
                if pending is not None:
                    pending.sent = False  # a message is sent whole, or raises
                    pending.tell_sent(False)
                with trio.move_on_after(WORD_SECONDS):
                    await self.lost.wait()
                self.lose(lost)
                return

    async def serve_reader(self) -> None:
        """Give what comes to those who wait for it, until the connection is lost."""
        try:
            while True:
                self._take(self._session.receive(await self.connection.receive()))
                while self._dropped:
                    self._forget(self._dropped.popleft())
        except JobworkerError as lost:
            self.lose(lost)

    def _take(self, received: Reply | Output | m.OutputEnd | None) -> None:
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
        """End a subscription whose caller has gone."""
        subscription = m.opened_by(reply.result)
        if subscription is not None:
            self._forget(subscription)

    def lose(self, error: JobworkerError) -> None:
        """Be lost, for this reason; a second one changes nothing."""
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
            reason = LinkLost(anew(error), sent=pending.sent, size=pending.size, broke=broke)
            pending.answer(reason)
        for inbox in self._inboxes.values():
            inbox.put(error)
        self.lost.set()

    def _refuse_largest(self, refusal: MessageTooLarge) -> None:
        """Refuse the request that was too large, or one that would be as well.

        No request that the server took whole is larger than the one that it closed for, so the
        largest is beyond the bound in any case.
        """
        largest = max(self._pending.values(), key=lambda pending: pending.size, default=None)
        if largest is not None:
            largest.answer(
                MessageTooLarge(
                    f"cannot send the request: it has {largest.size} bytes as JSON, more than the "
                    f"server takes in one message ({refusal.message}); it was not carried out",
                    remedy="ask for less at once, or raise limits.max_message_bytes there",
                )
            )
