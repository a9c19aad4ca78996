"""The spool: a job's output, and those who follow it.

The files are the truth (`output.files`). A follower is a place in them and a one-slot memory
channel, which serves as a wake token: it is poked only while its follower is idle, that is, has
read all there is and waits. So a slow follower lags alone, at the cost of an integer or two; a
late one starts at 0; and a burst of a thousand lines wakes each idle follower once. Nothing is
queued for anybody, nothing polls.

Why no wake-up is lost: a writer makes bytes readable first (in its thread) and then calls
`wake` (in Trio's thread); a follower looks for bytes and goes idle without a checkpoint between.
Either it saw the bytes, or `wake` sees it idle.

Followers read from the page cache on the event loop, and go to a thread only for what is not
cached. Followers that come to one place get one and the same Chunk, so that a caller can encode
it once (by identity).

The files are closed when the last user is gone: the owner, each follower, each call in a thread.
Where they were removed meanwhile, that is a thread's work: the disk frees their blocks then.
All but `create`, `open` and what `write` is given to run belong to Trio's thread.
"""

import math
import os
import time
from collections import deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import trio
from attrs import define, evolve, field, frozen

from jobworker.errors import FollowerStalled, InvalidParams, OutputError
from jobworker.jobs.output.batched_wakeups import AT_A_TIME, run_in_batches
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.index import BOTH, RECORD, LineStart, LogChunk, Place, ReadFilter
from jobworker.jobs.output.search import Start, StartPlace, bytes_before_line, find_start
from jobworker.jobs.output.sync import OutputSync
from jobworker.model.job import JobId, JobRecord, Stream
from jobworker.sandbox.channel import close_all
from jobworker.threads import in_thread

T = TypeVar("T")

RECENT_BYTES, MAX_RECENT = 1 << 20, 256
READER_THREADS = 4  # a spool: those who read what is not cached do not crowd out the others


@frozen
class _Recent:
    """What was read at a place, and where a reader goes on."""

    chunk: LogChunk
    after: Place
    was_all: bool
    """Whether nothing followed it when it was read."""


@frozen(kw_only=True)
class SpoolStatistics:
    """A spool at one moment."""

    stdout_bytes: int
    stderr_bytes: int
    discarded_bytes: int
    records: int
    sealed: bool
    followers: int
    idle_followers: int

    @property
    def truncated(self) -> bool:
        """Whether some output was thrown away."""
        return self.discarded_bytes > 0


@define(eq=False)
class Spool:
    """One job's output: one writer, any number of followers."""

    _files: OutputFiles
    sealed: bool = False
    missing: str = ""
    """What an ended job has written and its files do not have, in words."""
    counted_bytes: int = 0
    """What the budget of all output counts of this, while the job lives."""
    sync_fault: str = ""
    """Why the disk may not have the output, after `synced`."""
    read_at: float = -math.inf
    """When a follower came or read last, by the monotonic clock."""
    shut: bool = False
    """Whether the files go, or are gone, though there may be followers."""
    _idle: set[Follower] = field(factory=set)
    _to_poke: deque[Follower] = field(factory=deque)
    """Those of them that are to look again, in turns."""
    _poking: bool = False
    _followers: int = 0
    _users: int = 1
    _when_closed: Callable[[], None] | None = None
    _closed: bool = False
    _writer: trio.CapacityLimiter = field(factory=lambda: trio.CapacityLimiter(1))
    _readers: trio.CapacityLimiter = field(factory=lambda: trio.CapacityLimiter(READER_THREADS))
    _recent: dict[Hashable, _Recent] = field(factory=dict)
    """What was read last, for others who come to the same place; in order of reading."""
    _recent_bytes: int = 0

    @classmethod
    def create(cls, directory: Path, *, clock: Callable[[], int] = time.time_ns) -> Self:
        """Start an empty spool in `directory`, made too where it is missing. Call it in a thread.

        Raises OutputError where a spool stands there already or the disk refuses.
        """
        return cls(OutputFiles.create(directory, clock=clock))

    @classmethod
    def open(
        cls, directory: Path, *, goes_on: bool = False, clock: Callable[[], int] = time.time_ns
    ) -> Self:
        """Open the spool in `directory`. Call it in a thread.

        A sealed one can be read, by any number of openers at a time. Another was left by a
        process that died: it is recovered (what that keeps: `output.files`), and can be written
        on and sealed; so is that of a job which `goes_on`, sealed or not. Raises NotFound, Busy
        (another writer is alive), OutputError.
        """
        files = OutputFiles.open(directory, goes_on=goes_on, clock=clock)
        return cls(files, sealed=files.sealed)

    @classmethod
    def open_ended(cls, directory: Path, written: Mapping[Stream, int]) -> Self:
        """Open what there is of an ended job's output to read it. Call it in a thread.

        Nothing of it is changed. `written` is how many bytes of each stream the job's record tells
        of: `check_whole` raises where the files have fewer. Raises NotFound, OutputError.
        """
        files = OutputFiles.open_ended(directory)
        lost = list[str]()
        for stream in Stream:
            there = files.last.length_of(stream)
            told = max(written.get(stream, 0), there + files.lost[stream])
            if told > there:
                lost.append(f"{told - there} of {told} bytes of {stream.value}")
        return cls(files, sealed=True, missing=" and ".join(lost))

    @classmethod
    def gone(cls, sync_fault: str = "") -> Self:
        """The spool of an ended job whose files are not there: sealed, with nothing to read."""
        return cls(OutputFiles({}, -1, time.time_ns), sealed=True, sync_fault=sync_fault)

    @property
    def lost_bytes(self) -> int:
        """Bytes that the log once had and that were gone when it was opened."""
        return sum(self._files.lost.values())

    @property
    def size(self) -> int:
        """Bytes of both streams that can be read: the merged offset of the end."""
        return self._files.last.size

    @property
    def last_ns(self) -> int:
        """When the last record of the index was made, in ns since the epoch; 0 without one."""
        return self._files.last.time_ns

    @property
    def written_bytes(self) -> int:
        """Bytes that the data files hold, at any moment of a write."""
        return self._files.written_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes that the index has."""
        return self._files.records * RECORD.size

    def statistics(self) -> SpoolStatistics:
        """The spool at this moment."""
        last = self._files.last
        return SpoolStatistics(
            stdout_bytes=last.stdout_bytes,
            stderr_bytes=last.stderr_bytes,
            discarded_bytes=self._files.discarded_bytes,
            records=self._files.records,
            sealed=self.sealed,
            followers=self._followers,
            idle_followers=len(self._idle) + len(self._to_poke),
        )

    # --- writing ----------------------------------------------------------------------------

    def append_from_pipe(self, stream: Stream, pipe_fd: int, limit: int) -> int:
        """See `OutputFiles.append_from_pipe`. Call it by `write`, which wakes the followers."""
        return self._files.append_from_pipe(stream, pipe_fd, limit)

    def count_discarded(self, count: int) -> None:
        """See `OutputFiles.count_discarded`. Call it by `write`."""
        self._files.count_discarded(count)

    def restore_discarded(self, count: int) -> None:
        """Count as thrown away what an earlier service has told of, if the index knows of less."""
        known = self._files.discarded_bytes
        self._files.discarded_bytes = max(known, count + self.lost_bytes)

    async def write(self, work: Callable[[], T]) -> T:
        """Run `work`, which writes to this spool, in a thread; then wake those who wait for it.

        One at a time, in order of arrival. Cancellation counts only until the thread starts:
        then the work runs to its end, and data and index stay of one mind.
        """
        if self.sealed:
            raise trio.ClosedResourceError("cannot write to a sealed spool")
        with self.in_use():
            try:
                return await in_thread(work, limiter=self._writer)
            finally:
                self.wake()

    async def record_discarded(self) -> bool:
        """Have the index say exactly how much was thrown away: whether it does.

        For a writer that goes on under the next service. Cancelled like `write`.
        """
        if self.sealed or self._files.discarded_bytes == self._files.last.discarded_bytes:
            return True
        return await self.write(self._files.record_discarded)

    async def seal(self) -> None:
        """End the log, and every follower with its last byte; a second call does nothing.

        Shielded from cancellation: it waits for a write of some bytes and for nothing else.
        """
        with trio.CancelScope(shield=True):
            if not self.sealed:
                await self.write(self._files.seal)
        self.sealed = True
        self.wake()

    def wake(self) -> None:
        """Poke the idle followers: there is more to read, or nothing will come any more."""
        self._to_poke.extend(self._idle)
        self._idle.clear()
        if not self._poking:
            self._poking = True
            run_in_batches(self._poke_some)

    def _poke_some(self) -> bool:
        for _ in range(min(AT_A_TIME, len(self._to_poke))):
            self._to_poke.popleft().poke()
        self._poking = bool(self._to_poke)
        return self._poking

    @asynccontextmanager
    async def synced(self, job: JobId, owner: str) -> AsyncIterator[None]:
        """Have the disk take the output (fdatasync(2)) beside what the block does.

        The output is that of `job`, and shares threads with that of the same `owner` alone.

        Returns once both are done, or SYNC_SECONDS after its start: then the disk goes on by
        itself, or is asked later. `sync_fault` says where the disk refused before that. Without
        output this costs nothing.
        """
        files = self._files.to_sync()
        if not files:
            yield
            return
        sync = OutputSync(
            job=job,
            owner=owner,
            files=files,
            directory=self._files.directory,
            hold=self._hold,
            release=self._release,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync.run)
            yield
        self.sync_fault = sync.end()

    # --- reading ----------------------------------------------------------------------------

    def follow(
        self,
        offset: int = 0,
        *,
        streams: Collection[Stream] = BOTH,
        coalesce: bool = True,
        starts: tuple[LineStart, ...] = (),
    ) -> Follower:
        """Follow the log from merged `offset` on; close the follower in the end (`with`).

        Only the bytes of `streams` are shown; offsets count all. Without `coalesce` no chunk
        spans two records, so that each write that the job was seen to make has its time stamp.
        The streams of `starts` begin with a line, as those say.
        Raises InvalidParams where the log is shorter than `offset`.
        """
        self._check_not_shut()
        self.check_offset(offset)
        if self._closed:
            raise trio.ClosedResourceError("cannot follow a closed spool")
        self.read_at = time.monotonic()
        self._followers += 1
        self._users += 1
        view = ReadFilter(streams=frozenset(streams), coalesce=coalesce, starts=starts)
        return Follower(self, view, offset, *trio.open_memory_channel[None](1))

    def check_offset(self, offset: int) -> None:
        """Raise InvalidParams where the log is shorter than `offset`."""
        if offset > self.size:
            self.check_whole()
        if not 0 <= offset <= self.size:
            raise InvalidParams(
                f"cannot follow from byte {offset}: the output has {self.size} bytes",
                remedy="follow from an offset that was received, or from 0",
            )

    def check_whole(self) -> None:
        """Raise OutputError where an ended job has written more than its files have."""
        if self.missing:
            raise OutputError(
                f"cannot read all of the job's output: {self.missing} are missing on the server",
                remedy="its files have become shorter since the job's end; they stay as they are, "
                "and can be put back from a copy",
            )

    async def find_start(self, start: Start, streams: Collection[Stream] = BOTH) -> StartPlace:
        """Where `start` has a follower begin. Raises OutputError."""
        if start.tail_lines is None and start.since_ns is None:
            return StartPlace(start.offset, start.starts)
        self._check_not_shut()
        search = partial(find_start, self._files, start, streams, trio.from_thread.check_cancelled)
        with self.in_use():
            return await in_thread(search, limiter=self._readers)

    async def find(self, offset: int) -> Place:
        """The place of a merged offset."""
        return await self._ask(lambda nowait: self._files.find(offset, nowait=nowait))

    async def bytes_before_line(self, chunk: LogChunk) -> int | None:
        """See `output.search.bytes_before_line`."""
        return await self._ask(lambda nowait: bytes_before_line(self._files, chunk, nowait=nowait))

    async def read(self, place: Place, view: ReadFilter) -> tuple[LogChunk | None, Place]:
        """See `OutputFiles.read`. Who asks for what was read just before gets the same Chunk.

        Where that was all there was, and as much again has come by now, it is read anew: followers
        that are late would else have as many pieces to take as the first, and stay late.
        """
        self.read_at = time.monotonic()
        key = (place, view.streams, view.coalesce, view.starts)
        found = self._recent.get(key)
        if found is not None and len(found.chunk.data) <= view.max_bytes:
            size = len(found.chunk.data)
            has_doubled = found.was_all and self.size - found.chunk.end >= size
            if not (has_doubled and view.coalesce and 2 * size <= view.max_bytes):
                return found.chunk, found.after
        there = self.size
        chunk, after = await self._ask(lambda nowait: self._files.read(place, view, nowait=nowait))
        if chunk is not None and not self._closed and self._followers > 1:
            self._remember(key, _Recent(chunk, after, chunk.end >= there))
        return chunk, after

    def _remember(self, key: Hashable, new: _Recent) -> None:
        if (before := self._recent.pop(key, None)) is not None:
            self._recent_bytes -= len(before.chunk.data)
        self._recent[key] = new
        self._recent_bytes += len(new.chunk.data)
        while self._recent_bytes > RECENT_BYTES or len(self._recent) > MAX_RECENT:
            oldest = self._recent.pop(next(iter(self._recent)))
            self._recent_bytes -= len(oldest.chunk.data)

    def _forget_recent(self) -> None:
        self._recent.clear()
        self._recent_bytes = 0

    async def _ask(self, question: Callable[[bool], T]) -> T:
        """Read from the page cache at once, or else from the disk in a thread."""
        self._check_not_shut()
        try:
            return question(True)
        except BlockingIOError:
            with self.in_use():
                return await in_thread(question, False, limiter=self._readers)

    # --- users ------------------------------------------------------------------------------

    def close(self) -> None:
        """Give up the owner's share; a second call does nothing.

        Followers go on. Seal first, or they wait for what will never come.
        """
        if not self._closed:
            self._closed = True
            self._forget_recent()
            self._release()

    def lend(self, when_closed: Callable[[], None]) -> None:
        """Close as soon as nobody but the owner uses it any more, and call `when_closed` then."""
        self._when_closed = when_closed

    def forget(self, follower: Follower) -> None:
        """Give up a follower's share: for `Follower.close`."""
        self._idle.discard(follower)
        self._followers -= 1
        if self._followers < 2:
            self._forget_recent()
        if not self.shut:
            self._release()

    @property
    def has_files(self) -> bool:
        """Whether the files are open."""
        return self._users > 0

    def shut_out(self) -> None:
        """Close the files as soon as no thread uses them, for their descriptors.

        Followers, who are not told, get FollowerStalled where they go on.
        """
        self.shut = True
        self._forget_recent()
        self._hold()
        self._users -= self._followers
        self._release()

    def _check_not_shut(self) -> None:
        if self.shut:
            raise FollowerStalled(
                "cannot go on with the job's output: others are reading that of as many ended "
                "jobs as this service has descriptors for, and more of it was taken there",
                remedy="follow again from the offset",
            )

    def await_poke(self, follower: Follower) -> None:
        """Count a follower as idle: the next `wake` pokes it, once."""
        self._idle.add(follower)

    def cancel_poke(self, follower: Follower) -> None:
        """Undo `await_poke`."""
        self._idle.discard(follower)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the files open while the block lasts."""
        self._hold()
        try:
            yield
        finally:
            self._release()

    def _hold(self) -> None:
        self._users += 1

    def _release(self) -> None:
        self._users -= 1
        if self._users == 1 and self._when_closed is not None and not self._closed:
            self.close()
        elif not self._users:
            _close(self._files.let_go())
            when_closed, self._when_closed = self._when_closed, None  # it may refer to this spool
            if when_closed is not None:
                when_closed()


_closing = trio.lowlevel.RunVar[trio.CapacityLimiter]("closing")
"""One thread at a time closes removed files: many may have many gigabytes to free."""


def _close(files: Sequence[int]) -> None:
    """Close files: in a thread where they were removed."""
    if trio.lowlevel.in_trio_run() and any(not os.fstat(file).st_nlink for file in files):
        trio.lowlevel.spawn_system_task(_close_removed, files)
    else:
        close_all(files)


async def _close_removed(files: Sequence[int]) -> None:
    try:
        limiter = _closing.get()
    except LookupError:
        _closing.set(limiter := trio.CapacityLimiter(1))
    with trio.CancelScope(shield=True):
        await in_thread(close_all, files, limiter=limiter)


def as_of_now(record: JobRecord, spool: Spool) -> JobRecord:
    """A job's record with what it has written so far; that of one that has ended says so itself."""
    return record if record.ended else with_sizes(record, spool)


def with_sizes(record: JobRecord, spool: Spool) -> JobRecord:
    """A job's record with what its spool has, and what was thrown away, at this moment."""
    sizes = spool.statistics()
    return evolve(
        record,
        stdout_bytes=sizes.stdout_bytes,
        stderr_bytes=sizes.stderr_bytes,
        discarded_bytes=sizes.discarded_bytes,
    )
