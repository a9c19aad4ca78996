"""A job's output as it arrives: a queue that the connection's reader fills and one task empties.

Flow control is by credits. The server may be `WINDOW_BYTES` ahead of the consumer, and the client
grants new credit for consumed bytes, half a window at a time. So the reader never waits for a
consumer. A slow consumer delays neither replies nor another consumer, and costs one window of
memory.
"""

from collections.abc import Callable
from datetime import datetime
from typing import NoReturn

import trio
from attrs import define, field, frozen

from jobworker.errors import InternalError, JobworkerError, error_classes
from jobworker.model.job import JobRecord, Stream
from jobworker.protocol.frames import PIECE_BYTES
from jobworker.protocol.messages import Delivery, Encoding, OutputEnd, StreamStart
from jobworker.protocol.session import Output

WINDOW_BYTES = 8 * PIECE_BYTES
_GRANT_BYTES = WINDOW_BYTES // 2

DELIVERY = Delivery(encoding=Encoding.BINARY, credit_bytes=WINDOW_BYTES)


@frozen(kw_only=True)
class Chunk:
    """A piece of a job's output, never empty."""

    stream: Stream
    offset: int
    """Position of its first byte in both streams together."""
    time: datetime
    """When its first byte was read from the job."""
    data: bytes


@define(eq=False)
class Inbox:
    """The queue of one subscription's messages.

    The connection's reader puts messages in, and the consumer takes them from `receiver`.
    """

    _send: trio.MemorySendChannel[Output | OutputEnd | JobworkerError]
    receiver: trio.MemoryReceiveChannel[Output | OutputEnd | JobworkerError]

    @classmethod
    def make(cls) -> "Inbox":
        """Make an empty queue. It needs no bound, because the credits bound it."""
        return cls(*trio.open_memory_channel[Output | OutputEnd | JobworkerError](float("inf")))

    def put(self, item: Output | OutputEnd | JobworkerError) -> None:
        """Add a message, or drop it if the subscription was closed."""
        try:
            self._send.send_nowait(item)
        except trio.BrokenResourceError:
            return


@define(eq=False, kw_only=True)
class Following:
    """One subscription's output, chunk by chunk, over the one connection that it was opened on."""

    record: JobRecord | None = field(default=None, init=False)
    """The job at the end of its output; None before."""
    offset: int = 0
    """Position after the last chunk, in both streams together: the offset to resume at."""
    starts: tuple[StreamStart, ...] = ()
    """The starts of the streams of which no chunk has arrived yet."""
    _inbox: Inbox
    _grant: Callable[[int], None]
    _forget: Callable[[bool], None]
    _drop: Callable[[], None]
    _next: Output | OutputEnd | JobworkerError | None = field(default=None, init=False)
    """A message that `receive_nowait` has read from the queue and left for `__anext__`."""
    _failure: JobworkerError | None = field(default=None, init=False)
    """Why the output ended before its last byte; None for a whole one."""
    _taken_bytes: int = field(default=0, init=False)
    _closed: bool = field(default=False, init=False)

    def __del__(self) -> None:
        # The consumer has left its loop half way without `close`. Garbage collection may run in
        # any thread and at any point, so this only leaves a mark for the connection's reader.
        if not self._closed and self.record is None:
            self._drop()

    def close(self) -> None:
        """End the subscription. Idempotent."""
        if not self._closed:
            self._closed = True
            self._inbox.receiver.close()
            self._forget(self.record is not None)

    def receive_nowait(self) -> Chunk | None:
        """Return the next chunk if it has arrived; None if nothing has, or an end or an error."""
        if self._next is None:
            try:
                self._next = self._inbox.receiver.receive_nowait()
            except (trio.WouldBlock, trio.ClosedResourceError):
                return None
        if not isinstance(self._next, Output):
            return None
        item, self._next = self._next, None
        self._grant_taken()
        return self._take(item)

    async def __anext__(self) -> Chunk:
        if self.record is not None:
            await trio.lowlevel.checkpoint()
            self._raise_end()
        self._grant_taken()
        if self._next is None:
            self._next = await self._inbox.receiver.receive()
        else:
            await trio.lowlevel.checkpoint()
        item, self._next = self._next, None
        if isinstance(item, JobworkerError):
            self._inbox.put(item)  # a second call must raise too, not wait for ever
            raise copied(item)
        if isinstance(item, OutputEnd):
            self.record, self.offset = item.job, item.offset
            if item.error is not None:
                self._failure = _error_named(
                    item.error.get("name", ""), item.error.get("message", "")
                )
            self._raise_end()
        return self._take(item)

    def _grant_taken(self) -> None:
        if self._taken_bytes >= _GRANT_BYTES:
            self._grant(self._taken_bytes)
            self._taken_bytes = 0

    def _take(self, item: Output) -> Chunk:
        self._taken_bytes += len(item.data)
        header = item.header
        self.offset = header.offset + len(item.data)
        if self.starts:
            self.starts = tuple(each for each in self.starts if each.stream is not header.stream)
        return Chunk(stream=header.stream, offset=header.offset, time=header.time, data=item.data)

    def _raise_end(self) -> NoReturn:
        """Raise the end. Output that was cut must not look whole to a consumer that asks again."""
        if self._failure is not None:
            raise copied(self._failure)
        raise StopAsyncIteration


def _error_named(name: str, message: str) -> JobworkerError:
    classes = {cls.name: cls for cls in error_classes().values()}
    return classes.get(name, InternalError)(message)


def copied(error: JobworkerError) -> JobworkerError:
    """Return a copy to raise: if several tasks raised one error, its traceback would grow."""
    return type(error)(error.message, remedy=error.remedy, data=error.data)
