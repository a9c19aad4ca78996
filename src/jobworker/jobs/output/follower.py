"""A follower: one reader's place in a log, and the token that wakes it.

A follower holds no output. However far behind it is, the output that it has not read stays in the
files. `Spool.follow` makes followers; the module `output.spool` explains how they are woken.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, Self

import trio
from attrs import define, evolve

from jobworker.jobs.output.index import CHUNK_BYTES, LineStart, LogChunk, Place, ReadFilter
from jobworker.jobs.output.search import StartPlace


class Log(Protocol):
    """The log that a follower reads: two streams that grow until the log is sealed (a `Spool`)."""

    @property
    def size(self) -> int:
        """How many bytes of both streams can be read."""

    @property
    def sealed(self) -> bool:
        """Whether the log has ended: nothing is added any more."""

    def check_offset(self, offset: int) -> None:
        """Raise InvalidParams if the log is shorter than `offset`."""

    def check_whole(self) -> None:
        """Raise OutputError if the log has fewer bytes than its job has written."""

    async def find(self, offset: int) -> Place:
        """The place at a merged offset. Raises OutputError."""

    async def read(self, place: Place, view: ReadFilter) -> tuple[LogChunk | None, Place]:
        """Read at a place. Returns a chunk, or None if the filter hides it, and the place after it.

        Raises OutputError.
        """

    async def bytes_before_line(self, chunk: LogChunk) -> int | None:
        """How many bytes of a chunk belong to a line that began before it; None if all do.

        Raises OutputError.
        """

    def await_poke(self, follower: "Follower") -> None:
        """Poke this follower once, as soon as there is more to read or the log is sealed."""

    def cancel_poke(self, follower: "Follower") -> None:
        """Undo `await_poke` if the follower was not poked yet."""

    def forget(self, follower: "Follower") -> None:
        """Forget a follower that was closed."""


@define(eq=False)
class Follower:
    """One reader of a log that grows: an offset, and a token by which the log wakes the reader.

    One task at a time may read or wait: a second one gets trio.BusyResourceError.
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
        """Set the place to begin at. Call it before the first read.

        Raises InvalidParams if the log is shorter, trio.ClosedResourceError once closed.
        """
        self._check_open()
        self._log.check_offset(beginning.offset)
        self._start = beginning.offset
        self._view = evolve(self._view, starts=beginning.starts)

    @property
    def offset(self) -> int:
        """The merged offset of the next byte: all bytes before it were read or skipped."""
        return self._start if self._place is None else self._place.offset

    async def receive(self, max_bytes: int = CHUNK_BYTES, *, wait: bool = True) -> LogChunk | None:
        """Wait for the next bytes and return them. None: the log is sealed and has no more.

        `max_bytes`: the most bytes to return, at least 1. Without `wait`, None also means that no
        more bytes are there now. A cancelled call loses nothing: the next call returns what this
        one would have returned. Raises trio.BusyResourceError while another task receives,
        trio.ClosedResourceError once closed, FollowerStalled if the spool's files were closed for
        other readers, OutputError if the disk fails.
        """
        await trio.lowlevel.checkpoint()
        while self.behind or (wait and await self.wait_for_more()):
            chunk = await self.read(max_bytes)
            if chunk is not None:
                return chunk
        self._check_open()
        return None

    async def read(self, max_bytes: int = CHUNK_BYTES) -> LogChunk | None:
        """Read the next bytes that are there now; None if there are none to be seen.

        Arguments and errors as for `receive`. A read from the page cache has no checkpoint: the
        caller must have its own.
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
                await trio.lowlevel.checkpoint()  # hidden bytes may be many: let other tasks run
            self._check_open()
            return None

    async def _begin_with_line(
        self, chunk: LogChunk, after: Place
    ) -> tuple[LogChunk | None, Place]:
        """Skip the rest of a line that began before this chunk, the first one of its stream."""
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
        """The rules for the streams of which this reader has not yet reached the first line."""
        return self._view.starts

    @property
    def behind(self) -> bool:
        """Whether the log has more bytes now, also of streams that the reader does not want."""
        return self.offset < self._log.size

    @property
    def ends(self) -> bool:
        """Whether the log is sealed: nothing is added any more."""
        return self._log.sealed

    def check_whole(self) -> None:
        """Raise OutputError if the log has fewer bytes than its job has written.

        To be called at the log's end.
        """
        self._log.check_whole()

    async def wait_for_more(self) -> bool:
        """Wait until `behind`. False: the log is sealed and has no more bytes.

        Reads nothing. Has a checkpoint only if it waits. Raises trio.BusyResourceError and
        trio.ClosedResourceError, as `receive` does.
        """
        with self._alone():
            self._check_open()
            while not self.behind:
                if self._log.sealed:
                    return False
                # No checkpoint between `behind` and this, or a wake-up could be lost (`spool`).
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
        """Wake the reader. For `Spool.wake`, which may call it after the follower was closed."""
        if self._closed:
            return
        with suppress(trio.WouldBlock):  # the reader has not yet taken an earlier token
            self._poke.send_nowait(None)

    def close(self) -> None:
        """Close the follower. A `receive` that waits raises. A second call does nothing."""
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
