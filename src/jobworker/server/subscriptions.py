"""Output on its way to one connection: each subscription is a follower and the right to send.

A subscription sends at the pace at which its client takes: never more than the credit that the
client has granted, where it asked for credits; and one piece at a time in any case, so that what
waits for a slow client waits in the spool's files and at most one chunk in memory.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import trio
from attrs import define, field

from jobworker.errors import InvalidParams, JobworkerError, TooManyFollows
from jobworker.jobs.follower import Follower
from jobworker.jobs.output_index import CHUNK_BYTES, Chunk
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import JobId, JobRecord
from jobworker.protocol.messages import Delivery, Encoding, OutputEnd, OutputHeader
from jobworker.protocol.session import encode_output, encode_output_end
from jobworker.protocol.text_output import TextOutput

MAX_SUBSCRIPTIONS = 256

Send = Callable[[str | bytes], Awaitable[None]]
Show = Callable[[JobRecord], JobRecord]
"""A record as the client may see it."""


@define(eq=False, kw_only=True)
class Subscription:
    """One follower of one job's output."""

    number: int
    job: JobId
    follower: Follower
    encoding: Encoding
    until: int | None
    """Where to end, for who wants only what there is; None goes on to the job's last byte."""
    _credit: int | None
    _granted: trio.Event = field(factory=trio.Event)
    scope: trio.CancelScope = field(factory=trio.CancelScope)
    text: TextOutput = field(factory=TextOutput)

    def grant(self, count: int) -> None:
        """Allow `count` bytes more."""
        if self._credit is not None:
            self._credit += count
            self._granted.set()

    async def room(self) -> int:
        """Wait until something may be sent: how many bytes."""
        while self._credit is not None and self._credit <= 0:
            self._granted = trio.Event()
            await self._granted.wait()
        return CHUNK_BYTES if self._credit is None else min(self._credit, CHUNK_BYTES)

    def spend(self, count: int) -> None:
        """Count bytes that are being sent."""
        if self._credit is not None:
            self._credit -= count


@define(eq=False)
class Subscriptions:
    """Those of one connection, by number."""

    _supervisor: Supervisor
    _send: Send
    _show: Show
    _open: dict[int, Subscription] = field(factory=dict)
    _last: int = 0

    def open(
        self, job: JobId, follower: Follower, delivery: Delivery, until: int | None
    ) -> Subscription:
        """Take charge of a follower; nothing is sent before `run`. Raises TooManyFollows."""
        if len(self._open) >= MAX_SUBSCRIPTIONS:
            follower.close()
            raise TooManyFollows(
                f"cannot subscribe: this connection has {MAX_SUBSCRIPTIONS} subscriptions",
                remedy="end some of them, or open another connection",
            )
        self._last += 1
        made = self._open[self._last] = Subscription(
            number=self._last,
            job=job,
            follower=follower,
            encoding=delivery.encoding,
            until=until,
            credit=delivery.credit_bytes,
        )
        return made

    def find(self, number: int) -> Subscription:
        """The subscription of that number. Raises InvalidParams."""
        try:
            return self._open[number]
        except KeyError:
            raise InvalidParams(
                f"cannot find subscription {number}: it has ended or was never opened here"
            ) from None

    def cancel(self, number: int) -> None:
        """End a subscription without a word; one that has ended already is fine."""
        subscription = self._open.get(number)
        if subscription is not None:
            subscription.scope.cancel()

    async def run(self, number: int) -> None:
        """Send a subscription's output to its end, and then how its job went."""
        subscription = self._open[number]
        try:
            with subscription.scope:
                problem = await self._deliver(subscription)
                end = OutputEnd(
                    subscription=number,
                    offset=subscription.follower.offset,
                    job=self._show(await self._final_record(subscription)),
                    error=problem,
                )
                await self._send(encode_output_end(end))
        finally:
            subscription.follower.close()
            del self._open[number]

    def close(self) -> None:
        """Let go of what was opened and never run."""
        for subscription in self._open.values():
            subscription.follower.close()

    async def _final_record(self, subscription: Subscription) -> JobRecord:
        if subscription.until is None:
            return await self._supervisor.wait(subscription.job)
        return await self._supervisor.record(subscription.job)

    async def _deliver(self, subscription: Subscription) -> dict[str, str] | None:
        follower, until = subscription.follower, subscription.until
        try:
            while until is None or follower.offset < until:
                chunk = await follower.receive(wait=until is None)
                if chunk is None:
                    break
                await self._send_within_credit(subscription, chunk)
            for message in subscription.text.flush(follower.offset):
                await self._send(message)
        except JobworkerError as error:
            return {"name": error.name, "message": str(error)}
        return None

    async def _send_within_credit(self, subscription: Subscription, chunk: Chunk) -> None:
        sent = 0
        while sent < len(chunk.data):
            room = await subscription.room()
            piece = chunk.data[sent : sent + room]
            subscription.spend(len(piece))
            header = OutputHeader(
                subscription=subscription.number,
                stream=chunk.stream,
                offset=chunk.offset + sent,
                time=datetime.fromtimestamp(chunk.time_ns / 1e9, UTC),
            )
            await self._send(_encoded(subscription, header, piece))
            sent += len(piece)


def _encoded(subscription: Subscription, header: OutputHeader, data: bytes) -> str | bytes:
    if subscription.encoding is Encoding.TEXT:
        return subscription.text.encode(header, data)
    return encode_output(header, data, binary=subscription.encoding is Encoding.BINARY)
