"""Output on its way to one connection: each subscription is a follower and the right to send.

A subscription sends at the pace at which its client takes: never more than the credit that the
client has granted, where it asked for credits, and one piece at a time on a connection. It reads
only what it may send. So what waits for a slow client waits in the spool's files, and a stalled one
costs a place in them. Where output waits and no credit comes for `stall_seconds`, the subscription
ends with the error `follower_stalled`; the client may come back and go on at its offset.

Followers at one place get one and the same Chunk, and the message made of it is kept with it: what
a thousand clients follow is encoded once. Where output comes in many small pieces, of two streams
by turns or each with a time of its own, many of them are sent together.
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
from jobworker.jobs.output.index import Chunk
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import JobRecord
from jobworker.model.summary import summarize
from jobworker.model.units import format_duration, from_nanoseconds
from jobworker.protocol.frames import PIECE_BYTES, Frame, frame_text
from jobworker.protocol.messages import Delivery, Encoding, OutputEnd, OutputHeader
from jobworker.protocol.session import encode_output, encode_output_end, frame_output
from jobworker.protocol.text_output import TextOutput
from jobworker.server.crowds import Crowds
from jobworker.server.record_json import summary_of
from jobworker.server.traffic import FRAME_BYTES, LEAST_BYTES, Traffic

Send = Callable[[str | Sequence[Frame]], Awaitable[None]]
"""Sends a text message, or messages in their frames, one after the other."""
Problem = dict[str, str]
"""The name and the message of an error."""

_MOST_BYTES = {
    Encoding.BINARY: PIECE_BYTES,
    Encoding.BASE64: PIECE_BYTES // 2,  # four characters for three bytes
    Encoding.TEXT: PIECE_BYTES // 8,  # up to six for one
}
"""Output in one message, which has less than a mebibyte in any case."""
SLOW_SECONDS = 0.5


@define(eq=False, kw_only=True)
class Subscription:
    """One follower of one job's output."""

    number: int
    record: JobRecord
    """Its summary at the beginning: all there is to tell if it is removed meanwhile."""
    follower: Follower
    encoding: Encoding
    until: int | None
    """Where to end, for who wants only what there is; None goes on to the job's last byte."""
    _credit: int | None
    _granted: trio.Event = field(factory=trio.Event)
    scope: trio.CancelScope = field(factory=trio.CancelScope)
    text: TextOutput = field(factory=TextOutput)
    running: bool = False
    _pace: int = LEAST_BYTES

    def grant(self, count: int) -> None:
        """Allow `count` bytes more."""
        if self._credit is not None:
            self._credit += count
            self._granted.set()

    async def room(self, stall_seconds: float) -> int:
        """Wait until something may be sent: how many bytes. Raises FollowerStalled."""
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
                f"cannot go on sending: nothing was taken for {format_duration(stall_seconds)}",
                remedy="follow again from the offset",
            )
        return min(self._credit, most)

    def keep_pace(self, cost: int, seconds: float) -> None:
        """Send less at once where the last messages took long, and more where they did not.

        What is cut off with its connection is sent again, so a slow line that often breaks has to
        get small ones to get anywhere.
        """
        if seconds > SLOW_SECONDS:
            self._pace = max(LEAST_BYTES, self._pace // 2)
        elif cost >= self._pace:
            self._pace = min(PIECE_BYTES, self._pace * 2)

    async def take(self, limit: int) -> tuple[list[Frame], int]:
        """Messages for what there is now, and what they cost, in bytes sent in the same time.

        They end where they cost `limit`; they have no more bytes together than that.
        """
        frames: list[Frame] = []
        size = cost = 0
        while cost < limit:
            try:
                chunk = await self.follower.read(limit - size)
            except JobworkerError:
                if frames:
                    break  # the next read meets it again, and these are sent before
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
        """Whether there is something now that is to be sent."""
        if self.until is not None and self.follower.offset >= self.until:
            return False
        return self.follower.behind

    def _frame(self, chunk: Chunk) -> Frame:
        if self.encoding is Encoding.TEXT:  # what it is depends on what came before
            return frame_text(self.text.encode(self._header(chunk), bytes(chunk.data)))
        return chunk.forms.get((self.number, self.encoding), lambda: self._whole_frame(chunk))

    def _whole_frame(self, chunk: Chunk) -> Frame:
        """The message for a chunk alone, the same for each subscription of this number."""
        header = self._header(chunk)
        if self.encoding is Encoding.BINARY:
            return frame_output(header, chunk.data)
        return frame_text(encode_output(header, chunk.data))

    def _header(self, chunk: Chunk) -> OutputHeader:
        return OutputHeader(
            subscription=self.number,
            stream=chunk.stream,
            offset=chunk.offset,
            time=from_nanoseconds(chunk.time_ns),
        )


@define(eq=False)
class Subscriptions:
    """Those of one connection, by number."""

    _supervisor: Supervisor
    _traffic: Traffic
    _stall_seconds: float
    _max_open: int
    _crowds: Crowds
    _name: str
    """Of the client."""
    _open: dict[int, Subscription] = field(factory=dict)
    _last: int = 0
    _turn: trio.StrictFIFOLock = field(factory=trio.StrictFIFOLock)

    def check_room(self) -> None:
        """Raise TooManyFollows where `open` would."""
        if len(self._open) >= self._max_open:
            raise TooManyFollows(
                f"cannot subscribe: this connection has {self._max_open} subscriptions",
                remedy="end some of them, or open another connection",
            )
        self._crowds.check(self._name, TooManyFollows)

    def open(
        self, record: JobRecord, follower: Follower, delivery: Delivery, until: int | None
    ) -> Subscription:
        """Take charge of a follower; nothing is sent before `run`. Raises TooManyFollows."""
        try:
            self.check_room()
        except TooManyFollows:
            follower.close()
            raise
        self._crowds.take(self._name, TooManyFollows)
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
            self._drop(number)
            subscription.scope.cancel()
            if not subscription.running:
                subscription.follower.close()

    def _drop(self, number: int) -> None:
        if self._open.pop(number, None) is not None:
            self._crowds.give_back(self._name)

    @property
    def owe(self) -> bool:
        """Whether something is to be sent whose end is known. What live jobs write is without."""
        return any(
            each.running and (each.until is not None or each.follower.ends)
            for each in self._open.values()
        )

    async def run(self, number: int, send: Send) -> None:
        """Send a subscription's output to its end, and then how its job went."""
        subscription = self._open.get(number)
        if subscription is None:  # ended before it began
            return
        subscription.running = True
        try:
            with subscription.scope:
                problem = await self._deliver(subscription, send)
                await self._traffic.take_turn(self._name)
                record, problem = await self._final_record(subscription, problem)
                summary, told = summary_of(record)
                end = OutputEnd(
                    subscription=number,
                    offset=subscription.follower.offset,
                    job=summary,
                    error=problem,
                )
                await send(encode_output_end(end, told))
        finally:
            subscription.follower.close()
            self._drop(number)

    def close(self) -> None:
        """Let go of what was opened and never run."""
        for subscription in list(self._open.values()):
            subscription.follower.close()
            self._drop(subscription.number)

    async def _final_record(
        self, subscription: Subscription, problem: Problem | None
    ) -> tuple[JobRecord, Problem | None]:
        """The job's last record, as far as there is one, and what is wrong."""
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
                async with self._taking_turns(), self._traffic.share(self._name) as share:
                    frames, cost = await subscription.take(min(room, share))
                    began = trio.current_time()
                    if frames:
                        await send(frames)
                    del frames  # or each that waits for its turn would hold what it sent last
                    subscription.keep_pace(cost, trio.current_time() - began)
            for message in subscription.text.flush(subscription.follower.offset):
                await send(message)
            subscription.follower.check_whole()
        except JobworkerError as error:
            return _told(error)
        return None

    @asynccontextmanager
    async def _taking_turns(self) -> AsyncIterator[None]:
        """Read and send a piece at a time, however many subscriptions the connection has."""
        try:
            self._turn.acquire_nowait()  # most have one, and need no turn of the loop for this
        except trio.WouldBlock:
            await self._turn.acquire()
        try:
            yield
        finally:
            self._turn.release()

    async def _more(self, subscription: Subscription) -> bool:
        """Wait until there is something to read; False where nothing is to be sent any more."""
        if subscription.until is None:
            return await subscription.follower.wait_for_more()
        return subscription.unfinished


def _told(error: JobworkerError) -> Problem:
    return {"name": error.name, "message": str(error)}
