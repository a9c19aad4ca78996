"""Output on its way to one connection: a subscription is a follower with flow control by credits.

A subscription sends at the pace of its client (backpressure). A connection sends one piece at a
time. If the client asked for credits, the subscription never sends more bytes than the client has
granted. It reads only what it may send, so output for a slow client waits in the spool's files, and
a stalled client costs only its offset in them. If output waits and no credit comes for
`stall_seconds`, the subscription ends with the error `follower_stalled`. The client may follow the
job again from its offset.

Followers at the same offset get the same LogChunk, which keeps the message made of it. So
output that a thousand clients follow is encoded once. If output comes in many small chunks, because
the two streams alternate or each chunk has its own time, many of them are sent together.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio
from attrs import define, field

from jobworker.errors import (
    FollowerStalled,
    InvalidParams,
    JobworkerError,
    NotFound,
    ShuttingDown,
    TooManyFollows,
)
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.index import LogChunk
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import JobRecord
from jobworker.model.summary import summarize
from jobworker.model.units import format_duration, from_nanoseconds
from jobworker.protocol.frames import PIECE_BYTES, Frame, frame_text
from jobworker.protocol.messages import Delivery, Encoding, OutputEnd, OutputHeader
from jobworker.protocol.session import encode_output, encode_output_end, frame_output
from jobworker.protocol.text_output import TextOutput
from jobworker.server.delivery.record_json import summary_of
from jobworker.server.fairness.send_budget import FRAME_BYTES, LEAST_BYTES, SendBudget
from jobworker.server.fairness.wait_quota import WaitQuota

Send = Callable[[str | Sequence[Frame]], Awaitable[None]]
"""Send a text message, or several messages as frames, one after the other."""
Problem = dict[str, str]
"""The name and the message of an error."""

_MOST_BYTES = {
    Encoding.BINARY: PIECE_BYTES,
    Encoding.BASE64: PIECE_BYTES // 2,  # four characters for three bytes
    Encoding.TEXT: PIECE_BYTES // 8,  # up to six for one
}
"""The most bytes of output in one message; the message has less than a mebibyte in any encoding."""
SLOW_SECONDS = 0.5


@define(eq=False, kw_only=True)
class Subscription:
    """One follower of one job's output."""

    number: int
    record: JobRecord
    """The job's summary when the subscription began. It is sent at the end if the job was removed
    meanwhile."""
    follower: Follower
    encoding: Encoding
    until: int | None
    """The offset at which the subscription ends; None if it goes on to the job's last byte."""
    _credit: int | None
    _granted: trio.Event = field(factory=trio.Event)
    scope: trio.CancelScope = field(factory=trio.CancelScope)
    text: TextOutput = field(factory=TextOutput)
    running: bool = False
    sending: bool = False
    """Whether a message of it is on its way, which is sent whole whatever happens meanwhile."""
    _pace: int = LEAST_BYTES

    def grant(self, count: int) -> None:
        """Allow the subscription to send `count` bytes more."""
        if self._credit is not None:
            self._credit += count
            self._granted.set()

    async def room(self, stall_seconds: float) -> int:
        """Wait until the credit allows to send; returns how many bytes may be sent at most.

        Raises FollowerStalled if no credit comes within `stall_seconds`.
        """
        most = min(self._pace, _MOST_BYTES[self.encoding])
        if self._credit is None:
            return most
        if self._credit > 0:
            return min(self._credit, most)
        with trio.move_on_after(stall_seconds):
            while self._credit <= 0:
                self._granted = trio.Event()
                await self._granted.wait()
        if self._credit <= 0:
            raise FollowerStalled(
                f"cannot go on sending: no credit came for {format_duration(stall_seconds)}",
                remedy="follow again from the offset",
            )
        return min(self._credit, most)

    def keep_pace(self, cost: int, seconds: float) -> None:
        """Adapt the size of the next piece to the time that the last one took.

        The size is halved after a slow piece, and doubled after a full one that was not slow. A
        piece that is cut off with its connection is sent again. So on a slow line that often breaks
        only small pieces make progress.
        """
        if seconds > SLOW_SECONDS:
            self._pace = max(LEAST_BYTES, self._pace // 2)
        elif cost >= self._pace:
            self._pace = min(PIECE_BYTES, self._pace * 2)

    async def next_messages(self, limit: int) -> tuple[list[Frame], int]:
        """Read output that is there now. Returns its messages, and their cost.

        The cost is the number of bytes of output that take the same time. The messages have at most
        `limit` bytes of output together, and no message is added once they cost `limit`.
        """
        frames: list[Frame] = []
        size = cost = 0
        while cost < limit:
            try:
                chunk = await self.follower.read(limit - size)
            except JobworkerError:
                if frames:
                    break  # first these are sent; the next read meets the error again
                raise
            if chunk is None:
                break
            frames.append(self._frame(chunk))
            size += len(chunk.data)
            cost += max(len(chunk.data), FRAME_BYTES)
            if not self.unfinished:
                break
        if self._credit is not None:
            self._credit -= size
        return frames, cost

    @property
    def unfinished(self) -> bool:
        """Whether there is output now that is still to be sent."""
        if self.until is not None and self.follower.offset >= self.until:
            return False
        return self.follower.behind

    def _frame(self, chunk: LogChunk) -> Frame:
        if self.encoding is Encoding.TEXT:  # the text depends on the bytes before it
            return frame_text(self.text.encode(self._header(chunk), bytes(chunk.data)))
        return chunk.forms.get((self.number, self.encoding), lambda: self._whole_frame(chunk))

    def _whole_frame(self, chunk: LogChunk) -> Frame:
        """The message for one chunk; it is the same for all subscriptions with this number."""
        header = self._header(chunk)
        if self.encoding is Encoding.BINARY:
            return frame_output(header, chunk.data)
        return frame_text(encode_output(header, chunk.data))

    def _header(self, chunk: LogChunk) -> OutputHeader:
        return OutputHeader(
            subscription=self.number,
            stream=chunk.stream,
            offset=chunk.offset,
            time=from_nanoseconds(chunk.time_ns),
        )


@define(eq=False)
class Subscriptions:
    """The subscriptions of one connection, by number."""

    _supervisor: Supervisor
    _send_budget: SendBudget
    _stall_seconds: float
    _max_open: int
    _waits: WaitQuota
    _name: str
    """The client's name."""
    _open: dict[int, Subscription] = field(factory=dict)
    _last: int = 0
    _turn: trio.StrictFIFOLock = field(factory=trio.StrictFIFOLock)

    def check_room(self) -> None:
        """Raise TooManyFollows if `open` would."""
        if len(self._open) >= self._max_open:
            raise TooManyFollows(
                f"cannot subscribe: this connection has {self._max_open} subscriptions",
                remedy="end some of them, or open another connection",
            )
        self._waits.check(self._name, TooManyFollows)

    def open(
        self, record: JobRecord, follower: Follower, delivery: Delivery, until: int | None
    ) -> Subscription:
        """Make a subscription that owns `follower`; nothing is sent before `run`.

        Raises TooManyFollows, and then closes the follower.
        """
        try:
            self.check_room()
        except TooManyFollows:
            follower.close()
            raise
        self._waits.acquire(self._name, TooManyFollows)
        self._last += 1
        made = self._open[self._last] = Subscription(
            number=self._last,
            record=summarize(record),
            follower=follower,
            encoding=delivery.encoding,
            until=until,
            credit=delivery.credit_bytes,
        )
        return made

    def find(self, number: int) -> Subscription:
        """The open subscription of that number. Raises InvalidParams if there is none."""
        found = self._open.get(number)
        if found is None or found.scope.cancel_called:
            raise InvalidParams(
                f"cannot find subscription {number}: it has ended or was never opened here"
            )
        return found

    def cancel(self, number: int) -> None:
        """End a subscription without a message to the client; does nothing if it has ended.

        While a message of the subscription is being sent, the subscription keeps its place.
        Otherwise a client that reads next to nothing could have any number of messages in memory.
        """
        subscription = self._open.get(number)
        if subscription is not None:
            subscription.scope.cancel()
            if not subscription.sending:
                self._drop(number)
            if not subscription.running:
                subscription.follower.close()

    def _drop(self, number: int) -> None:
        if self._open.pop(number, None) is not None:
            self._waits.release(self._name)

    @property
    def owe(self) -> bool:
        """Whether output whose end is known is still to be sent; a live job's end is not known."""
        return any(
            each.running and (each.until is not None or each.follower.ends)
            for each in self._open.values()
        )

    async def run(self, number: int, send: Send) -> None:
        """Send a subscription's output to its end, and then the job's record (`OutputEnd`)."""
        subscription = self._open.get(number)
        if subscription is None:  # cancelled before it began
            return
        subscription.running = True
        try:
            with subscription.scope:
                problem = await self._deliver(subscription, send)
                await self._send_budget.wait_turn(self._name)
                record, problem = await self._final_record(subscription, problem)
                summary, told = summary_of(record)
                end = OutputEnd(
                    subscription=number,
                    offset=subscription.follower.offset,
                    job=summary,
                    error=problem,
                )
                await _send(subscription, send, encode_output_end(end, told))
        finally:
            subscription.follower.close()
            self._drop(number)

    def close(self) -> None:
        """Close the subscriptions that were opened and never run."""
        for subscription in list(self._open.values()):
            subscription.follower.close()
            self._drop(subscription.number)

    async def _final_record(
        self, subscription: Subscription, problem: Problem | None
    ) -> tuple[JobRecord, Problem | None]:
        """The job's last record that can be had, and the error to send with it, if any."""
        job = subscription.record.id
        to_the_end = subscription.until is None and problem is None
        try:
            ask = self._supervisor.wait if to_the_end else self._supervisor.record
            record = await ask(job, self._name)
        except JobworkerError as error:
            record = subscription.record
            gone = isinstance(error, NotFound)
            if isinstance(error, ShuttingDown) and to_the_end:  # the next service has the rest
                problem = _told(error)
        else:
            gone = self._supervisor.is_being_removed(job)
        if gone and to_the_end:
            problem = _told(NotFound(f"cannot follow job {job} any more: it was removed"))
        return record, problem

    async def _deliver(self, subscription: Subscription, send: Send) -> Problem | None:
        try:
            while await self._more(subscription):
                room = await subscription.room(self._stall_seconds)
                async with self._taking_turns(), self._send_budget.share(self._name) as share:
                    frames, cost = await subscription.next_messages(min(room, share))
                    began = trio.current_time()
                    if frames:
                        await _send(subscription, send, frames)
                    del frames  # else each subscription that waits would hold its last piece
                    subscription.keep_pace(cost, trio.current_time() - began)
            for message in subscription.text.flush(subscription.follower.offset):
                await _send(subscription, send, message)
            subscription.follower.check_whole()
        except JobworkerError as error:
            return _told(error)
        return None

    @asynccontextmanager
    async def _taking_turns(self) -> AsyncIterator[None]:
        """Hold the connection's turn: its subscriptions read and send one piece at a time."""
        try:
            self._turn.acquire_nowait()  # most connections have one subscription; no checkpoint
        except trio.WouldBlock:
            await self._turn.acquire()
        try:
            yield
        finally:
            self._turn.release()

    async def _more(self, subscription: Subscription) -> bool:
        """Wait until there is output to read; False if nothing more is to be sent."""
        if subscription.until is None:
            return await subscription.follower.wait_for_more()
        return subscription.unfinished


async def _send(subscription: Subscription, send: Send, message: str | Sequence[Frame]) -> None:
    await trio.lowlevel.checkpoint_if_cancelled()  # a cancelled one may have no place any more
    subscription.sending = True
    try:
        await send(message)
    finally:
        subscription.sending = False


def _told(error: JobworkerError) -> Problem:
    return {"name": error.name, "message": str(error)}
