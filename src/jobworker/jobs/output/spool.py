"""The spool: a job's output and the followers that read it.

Followers read the output from its files (`output.files`); nothing is queued for them. A follower is
a place in the log and a memory channel with one slot, which holds a wake token. The spool puts the
token there only while the follower is idle: it has read everything and waits. So a slow follower
delays nobody and costs an integer or two, a late one starts at 0, and a burst of a thousand lines
wakes each idle follower once. Nothing polls.

Why no wake-up is lost: a writer first makes bytes readable in its thread. Then it calls `wake` in
Trio's thread. A follower checks for bytes and becomes idle without a checkpoint in between. So
either the follower sees the bytes, or `wake` sees an idle follower.

Followers read from the page cache in the event loop, and use a thread only for bytes that are not
cached. Followers at the same place get the same LogChunk object, so the server encodes it once.

The files are closed when the last user is gone (`output.spool_users`). All methods belong to Trio's
thread, except `create`, `open`, `open_ended` and the functions that `write` runs.
"""

import math
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Mapping,
)
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import trio
from attrs import Factory, define, field

from jobworker.errors import FollowerStalled, InvalidParams, OutputError
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.idle_followers import IdleFollowers
from jobworker.jobs.output.index import BOTH, RECORD, LineStart, LogChunk, Place, ReadFilter
from jobworker.jobs.output.recent_chunks import RecentChunks
from jobworker.jobs.output.search import Start, StartPlace, bytes_before_line, find_start
from jobworker.jobs.output.sizes import SpoolStatistics
from jobworker.jobs.output.spool_users import SpoolUsers
from jobworker.jobs.output.sync import OutputSync
from jobworker.model.job import JobId, Stream
from jobworker.threads import in_thread

T = TypeVar("T")

READER_THREADS = 4
"""The most threads that read from the disk for one spool, so that its readers leave threads to
those of other spools."""


@define(eq=False)
class Spool:
    """One job's output, with one writer and any number of followers."""

    _files: OutputFiles
    sealed: bool = False
    missing: str = ""
    """How many bytes of each stream an ended job has written and its files do not have, as text; ""
    if none are missing."""
    counted_bytes: int = 0
    """How many bytes of this output `OutputBudget.live_bytes` includes."""
    sync_fault: str = ""
    """Why the output may not be on the disk, once `synced` has ended; "" if it is there."""
    read_at: float = -math.inf
    """The time when a follower began or read last, by time.monotonic."""
    _idle: IdleFollowers = field(factory=IdleFollowers)
    _users: SpoolUsers = field(
        default=Factory(lambda self: SpoolUsers(self._files), takes_self=True), init=False
    )
    _writer: trio.CapacityLimiter = field(factory=lambda: trio.CapacityLimiter(1))
    _readers: trio.CapacityLimiter = field(factory=lambda: trio.CapacityLimiter(READER_THREADS))
    _recent: RecentChunks = field(factory=RecentChunks)

    @classmethod
    def create(cls, directory: Path, *, clock: Callable[[], int] = time.time_ns) -> Self:
        """Make an empty spool in `directory`, which is made if it is missing. Call it in a thread.

        `clock` returns nanoseconds since the epoch. Raises OutputError if there is a spool already
        or if the disk refuses.
        """
        return cls(OutputFiles.create(directory, clock=clock))

    @classmethod
    def open(
        cls, directory: Path, *, goes_on: bool = False, clock: Callable[[], int] = time.time_ns
    ) -> Self:
        """Open the spool in `directory`. Call it in a thread.

        A sealed spool is opened to read, by any number of openers at a time. If it is not sealed,
        its writer died: the files are repaired (`output.files`), and the spool can be written on
        and sealed. `goes_on`: the job still lives, so a seal is removed. Raises NotFound, Busy if
        another writer is alive, OutputError.
        """
        files = OutputFiles.open(directory, goes_on=goes_on, clock=clock)
        return cls(files, sealed=files.sealed)

    @classmethod
    def open_ended(cls, directory: Path, written: Mapping[Stream, int]) -> Self:
        """Open the output of an ended job to read, as far as it is there. Call it in a thread.

        No file is changed. `written`: how many bytes of each stream the job has written by its
        record. If the files have fewer, `check_whole` raises. Raises NotFound, OutputError.
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
        """The spool of an ended job without files: sealed and empty."""
        return cls(OutputFiles.gone(), sealed=True, sync_fault=sync_fault)

    @property
    def lost_bytes(self) -> int:
        """How many bytes of the log were missing when it was opened."""
        return sum(self._files.lost.values())

    @property
    def size(self) -> int:
        """How many bytes of both streams can be read: the merged offset of the log's end."""
        return self._files.last.size

    @property
    def last_ns(self) -> int:
        """The time of the last record of the index, in ns since the epoch; 0 without one."""
        return self._files.last.time_ns

    @property
    def written_bytes(self) -> int:
        """The number of bytes in the data files, also during a write."""
        return self._files.written_bytes

    @property
    def index_bytes(self) -> int:
        """The size of the index in bytes."""
        return self._files.records * RECORD.size

    def statistics(self) -> SpoolStatistics:
        """The present state of the spool."""
        last = self._files.last
        return SpoolStatistics(
            stdout_bytes=last.stdout_bytes,
            stderr_bytes=last.stderr_bytes,
            discarded_bytes=self._files.discarded_bytes,
            records=self._files.records,
            sealed=self.sealed,
            followers=self._users.followers,
            idle_followers=len(self._idle),
        )

    # --- writing ----------------------------------------------------------------------------

    def append_from_pipe(self, stream: Stream, pipe_fd: int, limit: int) -> int:
        """See `OutputFiles.append_from_pipe`. Have `write` call it, which wakes the followers."""
        return self._files.append_from_pipe(stream, pipe_fd, limit)

    def count_discarded(self, count: int) -> None:
        """See `OutputFiles.count_discarded`. Have `write` call it."""
        self._files.count_discarded(count)

    def restore_discarded(self, count: int) -> None:
        """Count `count` bytes as discarded, by an earlier service's word, if the index has fewer.

        Bytes that were missing when the spool was opened count in addition.
        """
        known = self._files.discarded_bytes
        self._files.discarded_bytes = max(known, count + self.lost_bytes)

    async def write(self, work: Callable[[], T]) -> T:
        """Run `work`, which writes to this spool, in a thread, and then wake the idle followers.

        Returns the result of `work`. One thread at a time writes, in the order of the calls. Once
        the thread has started, a cancellation does not interrupt it, so data and index stay
        consistent. Raises trio.ClosedResourceError if the spool is sealed, and whatever `work`
        raises.
        """
        if self.sealed:
            raise trio.ClosedResourceError("cannot write to a sealed spool")
        with self.in_use():
            try:
                return await in_thread(work, limiter=self._writer)
            finally:
                self.wake()

    async def record_discarded(self) -> bool:
        """Write the exact count of discarded bytes to the index. Returns False if that fails.

        For a job whose output the next service goes on with. Cancelled like `write`.
        """
        if self.sealed or self._files.discarded_bytes == self._files.last.discarded_bytes:
            return True
        return await self.write(self._files.record_discarded)

    async def seal(self) -> None:
        """End the log, so that each follower ends after the last byte. A second call does nothing.

        Shielded from cancellation: it waits only for a write of some bytes.
        """
        with trio.CancelScope(shield=True):
            if not self.sealed:
                await self.write(self._files.seal)
        self.sealed = True
        self.wake()

    def wake(self) -> None:
        """Wake the idle followers: there is more to read, or the log has ended."""
        self._idle.wake()

    @asynccontextmanager
    async def synced(self, job: JobId, owner: str) -> AsyncIterator[None]:
        """Sync the output to the disk (fdatasync(2)) while the block runs.

        `job` is the id of this spool's job. Jobs of the same `owner` share threads for their syncs.
        Returns once both the block and the sync are done, or `SYNC_SECONDS` after the start
        (`output.sync`): then the sync goes on in the background, or is done later. After that
        `sync_fault` says whether the sync has failed. Without output this costs nothing.
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
            hold=self._users.hold,
            release=self._users.release,
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
        """Return a follower that reads the log from merged `offset` on. Close it (`with`).

        `streams`: only their bytes are shown; offsets count the bytes of both. `coalesce`: see
        `ReadFilter`. `starts`: the line with which each of these streams begins. Raises
        InvalidParams if the log is shorter than `offset`, OutputError if the offset is in a missing
        part of the log, FollowerStalled after `shut_out`, trio.ClosedResourceError after `close`.
        """
        self._check_not_shut()
        self.check_offset(offset)
        if self._users.closed:
            raise trio.ClosedResourceError("cannot follow a closed spool")
        self.read_at = time.monotonic()
        self._users.add_follower()
        view = ReadFilter(streams=frozenset(streams), coalesce=coalesce, starts=starts)
        return Follower(self, view, offset, *trio.open_memory_channel[None](1))

    def check_offset(self, offset: int) -> None:
        """Raise InvalidParams if the log is shorter than `offset`; OutputError if it was longer."""
        if offset > self.size:
            self.check_whole()
        if not 0 <= offset <= self.size:
            raise InvalidParams(
                f"cannot follow from byte {offset}: the output has {self.size} bytes",
                remedy="follow from an offset that was received, or from 0",
            )

    def check_whole(self) -> None:
        """Raise OutputError if an ended job has written more bytes than its files have."""
        if self.missing:
            raise OutputError(
                f"cannot read all of the job's output: {self.missing} are missing on the server",
                remedy="its files have become shorter since the job's end; have the server's "
                "administrator put them back from a copy",
            )

    async def find_start(self, start: Start, streams: Collection[Stream] = BOTH) -> StartPlace:
        """Find the place that `start` describes. Raises OutputError, FollowerStalled."""
        if start.tail_lines is None and start.since_ns is None:
            return StartPlace(start.offset, start.starts)
        self._check_not_shut()
        search = partial(find_start, self._files, start, streams, trio.from_thread.check_cancelled)
        with self.in_use():
            return await in_thread(search, limiter=self._readers)

    async def find(self, offset: int) -> Place:
        """The place at a merged offset. Raises OutputError, FollowerStalled."""
        return await self._look_up(lambda nowait: self._files.find(offset, nowait=nowait))

    async def bytes_before_line(self, chunk: LogChunk) -> int | None:
        """See `output.search.bytes_before_line`. Raises OutputError, FollowerStalled."""
        return await self._look_up(
            lambda nowait: bytes_before_line(self._files, chunk, nowait=nowait)
        )

    async def read(self, place: Place, view: ReadFilter) -> tuple[LogChunk | None, Place]:
        """See `OutputFiles.read`. Followers at the same place get the same chunk (`RecentChunks`).

        Raises OutputError, FollowerStalled.
        """
        self.read_at = time.monotonic()
        found = self._recent.get(place, view, self.size)
        if found is not None:
            return found
        there = self.size
        chunk, after = await self._look_up(
            lambda nowait: self._files.read(place, view, nowait=nowait)
        )
        if chunk is not None and not self._users.closed and self._users.followers > 1:
            self._recent.put(place, view, chunk, after, there)
        return chunk, after

    async def _look_up(self, look: Callable[[bool], T]) -> T:
        """Call `look(True)`, which reads the page cache, or else `look(False)` in a thread."""
        self._check_not_shut()
        try:
            return look(True)
        except BlockingIOError:
            with self.in_use():
                return await in_thread(look, False, limiter=self._readers)

    # --- users ------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the spool for its owner. A second call does nothing.

        Followers go on, and the files stay open for them. Seal the spool first: otherwise followers
        wait for ever.
        """
        self._recent.clear()
        self._users.close()

    def lend(self, when_closed: Callable[[], None]) -> None:
        """See `SpoolUsers.lend`."""
        self._users.lend(when_closed)

    def forget(self, follower: Follower) -> None:
        """Forget a follower that was closed. For `Follower.close`."""
        self._idle.discard(follower)
        if self._users.followers <= 2:  # one follower alone shares no chunks
            self._recent.clear()
        self._users.remove_follower()

    @property
    def has_files(self) -> bool:
        """Whether the spool has users, so its files are open."""
        return self._users.any

    @property
    def shut(self) -> bool:
        """Whether `shut_out` was called: the files are closed though there may be followers."""
        return self._users.shut

    def shut_out(self) -> None:
        """Close the files once no thread uses them, to free their descriptors.

        Followers are not woken. They get FollowerStalled from their next read.
        """
        self._recent.clear()
        self._users.shut_out()

    def in_use(self) -> AbstractContextManager[None]:
        """Keep the files open during the block."""
        return self._users.in_use()

    def _check_not_shut(self) -> None:
        if self.shut:
            raise FollowerStalled(
                "cannot go on with the job's output: the service has no file descriptor left for "
                "the output of more ended jobs, and most of those open are this owner's",
                remedy="follow again from the offset",
            )

    def await_poke(self, follower: Follower) -> None:
        """Count a follower as idle. The next `wake` wakes it, once."""
        self._idle.add(follower)

    def cancel_poke(self, follower: Follower) -> None:
        """Undo `await_poke`."""
        self._idle.discard(follower)
