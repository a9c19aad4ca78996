"""A follower: one reader's place in a spool, and the token that wakes it.

It holds no output: what it has not read stays in the files, however far behind it is. The theory
of waking is in `spool`, whose `follow` makes followers.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, Self

import trio
from attrs import define, evolve

from jobworker.jobs.output.index import CHUNK_BYTES, LineStart, LogChunk, Place, ReadFilter
from jobworker.jobs.output.search import StartPlace


class Log(Protocol):
    """What a follower reads: a log of two streams that grows until it is sealed (a `Spool`)."""

    @property
    def size(self) -> int:
        """Bytes of both streams that can be read."""

    @property
    def sealed(self) -> bool:
        """Whether nothing is added any more."""

    def check_offset(self, offset: int) -> None:
        """Raise InvalidParams where the log is shorter than `offset`."""

    def check_whole(self) -> None:
        """Raise OutputError where the log has less than its job has written."""

    async def find(self, offset: int) -> Place:
        """The place of a merged offset. Raises OutputError."""

    async def read(self, place: Place, view: ReadFilter) -> tuple[LogChunk | None, Place]:
        """The chunk at a place, if there is one to be seen, and the place after it."""

    async def bytes_before_line(self, chunk: LogChunk) -> int | None:
        """How many bytes of a chunk belong to a line that began before it; None for all."""

    def await_poke(self, follower: "Follower") -> None:
        """Poke this follower once there is more to see."""

    def cancel_poke(self, follower: "Follower") -> None:
        """Do not poke it, where that is still to come."""

    def forget(self, follower: "Follower") -> None:
        """Forget a follower that was closed."""


@define(eq=False)
class Follower:
    """A reader of a log that grows: an offset, and a token that says when to look again.

    One task's: a second one that reads or waits meanwhile gets trio.BusyResourceError.
    """

    _log: Log
    _view: ReadFilter
    _start: int
    _poke: trio.MemorySendChannel[None]
    _poked: trio.MemoryReceiveChannel[None]
    _place: Place | None = None
    _busy: bool = False
    _closed: bool = False

    def begin(self, beginning: StartPlace) -> None:
        """Begin there, before anything is read. Raises InvalidParams where the log is shorter."""
        self._check_open()
        self._log.check_offset(beginning.offset)
        self._start = beginning.offset
        self._view = evolve(self._view, starts=beginning.starts)

    @property
    def offset(self) -> int:
        """The merged offset up to which everything was received or passed over."""
        return self._start if self._place is None else self._place.offset

    async def receive(self, max_bytes: int = CHUNK_BYTES, *, wait: bool = True) -> LogChunk | None:
        """Wait for the next bytes, at most `max_bytes` (at least 1); None is the sealed log's end.

        Without `wait` None is also the end of what there is now.
        Cancellation loses nothing: the next call gives what this one would have given. Raises
        trio.BusyResourceError while another task receives, trio.ClosedResourceError once closed,
        OutputError where the disk fails.
        """
        await trio.lowlevel.checkpoint()
        while self.behind or (wait and await self.wait_for_more()):
            chunk = await self.read(max_bytes)
            if chunk is not None:
                return chunk
        self._check_open()
        return None

    async def read(self, max_bytes: int = CHUNK_BYTES) -> LogChunk | None:
        """Read the next of what is there now, as `receive`; None where nothing is to be seen.

        What the page cache holds is read without a checkpoint: for callers that have their own.
        """
        with self._alone():
            while self.behind:
                place = self._place or await self._log.find(self._start)
                view = evolve(self._view, max_bytes=max_bytes)
                chunk, after = await self._log.read(place, view)
                if chunk is not None and any(each.stream is chunk.stream for each in view.starts):
                    chunk, after = await self._begin_with_line(chunk, after)
                self._check_open()
                self._place = after
                if chunk is not None:
                    return chunk
                await trio.lowlevel.checkpoint()  # a long way through the other stream
            self._check_open()
            return None

    async def _begin_with_line(
        self, chunk: LogChunk, after: Place
    ) -> tuple[LogChunk | None, Place]:
        """Pass over what is left of a line that began before its stream does here."""
        skipped = await self._log.bytes_before_line(chunk)
        if skipped is None:
            return None, after
        if skipped:
            after = await self._log.find(chunk.offset + skipped)
        waiting = tuple(each for each in self._view.starts if each.stream is not chunk.stream)
        self._view = evolve(self._view, starts=waiting)
        return None if skipped else chunk, after

    @property
    def starts(self) -> tuple[LineStart, ...]:
        """Of the streams that have not begun."""
        return self._view.starts

    @property
    def behind(self) -> bool:
        """Whether there is more in the log now, in whichever stream."""
        return self.offset < self._log.size

    @property
    def ends(self) -> bool:
        """Whether the log has an end: nothing is added any more."""
        return self._log.sealed

    def check_whole(self) -> None:
        """Raise OutputError where the log has less than its job has written: at its end."""
        self._log.check_whole()

    async def wait_for_more(self) -> bool:
        """Wait until there is more in the log, in whichever stream; False is the sealed log's end.

        Reads nothing, has a checkpoint only where it waits, and raises as `receive` does.
        """
        with self._alone():
            self._check_open()
            while not self.behind:
                if self._log.sealed:
                    return False
                # No checkpoint between the look and this: see the module's theory.
                self._log.await_poke(self)
                try:
                    await self._poked.receive()
                finally:
                    self._log.cancel_poke(self)
                self._check_open()
            return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._busy:
            raise trio.BusyResourceError("another task receives from this follower")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this follower was closed")

    def poke(self) -> None:
        """Say that there is more to see: for `Spool.wake`, which may come late."""
        if self._closed:
            return
        with suppress(trio.WouldBlock):  # a token that nobody took yet says the same
            self._poke.send_nowait(None)

    def close(self) -> None:
        """Be forgotten by the spool; a second call does nothing. A waiting `receive` raises."""
        if not self._closed:
            self._closed = True
            self._poked.close()
            self._poke.close()
            self._log.forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[LogChunk]:
        return self

    async def __anext__(self) -> LogChunk:
        chunk = await self.receive()
        if chunk is None:
            raise StopAsyncIteration
        return chunk
