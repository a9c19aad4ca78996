"""A job's output on disk: the files `stdout`, `stderr` and `index` of one directory.

splice(2) moves bytes from the job's pipe to the end of a data file. Then a record goes to the end
of the index (`output.index`). What holds:

- The data comes first, its record second. So the index never describes bytes that are not there,
  and a process that dies leaves at most one range of bytes without a record.
- `OutputFiles.open` repairs the files after a crash. It cuts off a torn record, and records that
  describe more bytes than the data files hold. It makes a record for bytes without one: for
  stdout, then for stderr, with the time of the file's last change. So every byte on the disk is in
  the log. Only the order of the two streams within that last range may be lost. After a crash of
  the process alone, at most a torn record is cut off. If more records have to go, the data files
  have become shorter since (a power cut, a repair, an older copy). `lost` says by how much, and the
  log counts these bytes as discarded.
- `OutputFiles.open_ended` changes no file. The service does not write to an ended job's files any
  more. So a fault in them does not come from a crash of the service, and an administrator may
  repair it. The records that `open` would write are kept in memory.
- Bytes that the disk refuses stay in the pipe. If the disk refuses only the record, the bytes are
  in the log all the same: the record is kept in memory, and the next write has to store it first.
  If the process dies before that, `open` makes the same record.

No write waits for the disk. While the job runs, a power cut may take the bytes that were written
since the file system's last write-back. At the job's end the spool syncs the files
(`Spool.synced`).

One process writes, and a lock excludes others. Its caller makes one call at a time of those that
write. Any number of threads may read. Every call may wait for the disk, and for nothing else, so
the caller provides a thread.
"""

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from attrs import define, evolve, field

from jobworker.errors import OutputError
from jobworker.jobs.output.directory import (
    create_files,
    disk_errors,
    full_disk_may_refuse,
    lock_to_read,
    open_files,
    remove_files,
)
from jobworker.jobs.output.file_reads import FileReads
from jobworker.jobs.output.index import (
    MAX_BYTES,
    RECORD,
    LogChunk,
    Place,
    ReadFilter,
    Record,
    plan_read,
)
from jobworker.jobs.output.index_file import IndexFile
from jobworker.model.job import Stream


@define(eq=False)
class OutputFiles:
    """The three open files of one job. `records` and `last` describe the log that can be read."""

    _data: dict[Stream, int]
    _index: IndexFile
    _reads: FileReads
    _clock: Callable[[], int]
    _written: dict[Stream, int] = field(factory=lambda: dict.fromkeys(Stream, 0))
    discarded_bytes: int = 0
    sealed: bool = False
    lost: dict[Stream, int] = field(factory=lambda: dict.fromkeys(Stream, 0))
    """The bytes of each stream that records describe and the data file does not have."""
    directory: Path = field(default=Path(), kw_only=True)
    """The directory in which the files were opened."""

    @classmethod
    def create(cls, directory: Path, *, clock: Callable[[], int] = time.time_ns) -> Self:
        """Make the files in `directory`; see `create_files`.

        `clock` returns nanoseconds since the epoch. Raises OutputError.
        """
        return cls._of(create_files(directory), directory, clock)

    @classmethod
    def open(
        cls, directory: Path, *, goes_on: bool = False, clock: Callable[[], int] = time.time_ns
    ) -> Self:
        """Open the files in `directory`: sealed files to read, others to write on after a repair.

        `goes_on`: the job still lives, so a seal is removed. A service that died may have sealed
        the files without recording the end. Raises NotFound if the files are missing, Busy if
        another process writes to them, OutputError if the disk fails.
        """
        with ExitStack() as undo:
            files = cls._open(directory, False, clock)
            undo.callback(files.close)
            if goes_on or not files.sealed:
                files.close()
                files = cls._open(directory, True, clock)
                undo.callback(files.close)
                if files.sealed and goes_on:
                    files._index.cut_seal()
                    files.sealed = False
                if not files.sealed:
                    files._recover()
            else:
                lock_to_read(files._index.fd)
            undo.pop_all()
        return files

    @classmethod
    def _of(cls, fds: Sequence[int], directory: Path, clock: Callable[[], int]) -> Self:
        *data, index = fds
        reads = FileReads()
        streams = dict(zip(Stream, data, strict=True))
        return cls(streams, IndexFile(index, reads), reads, clock, directory=directory)

    @classmethod
    def gone(cls) -> Self:
        """The files of an ended job without output: there are none."""
        reads = FileReads()
        return cls({}, IndexFile(-1, reads), reads, time.time_ns)

    @classmethod
    def _open(
        cls,
        directory: Path,
        writable: bool,
        clock: Callable[[], int],
        *,
        partial: bool = False,
    ) -> Self:
        files = cls._of(open_files(directory, writable=writable, partial=partial), directory, clock)
        with ExitStack() as undo, disk_errors("open", directory):
            undo.callback(files.close)
            files._load()
            undo.pop_all()
        return files

    @classmethod
    def open_ended(cls, directory: Path) -> Self:
        """Open the files of an ended job to read, as far as they are there. Changes no file.

        An empty file in memory replaces a missing one. `lost` says how many bytes are missing by
        the index. Raises NotFound if the directory is missing, OutputError if the disk fails.
        """
        files = cls._open(directory, False, time.time_ns, partial=True)
        with ExitStack() as undo, disk_errors("open", directory):
            undo.callback(files.close)
            if not files.sealed:
                files._show_all()
                files.sealed = True
            lock_to_read(files._index.fd)
            undo.pop_all()
        return files

    @classmethod
    def look_at(cls, directory: Path, *, partial: bool = False) -> Self:
        """Open the files in `directory` to read, without repair and without a lock.

        `partial`: replace a missing file by an empty one in memory. Raises NotFound, OutputError.
        """
        return cls._open(directory, False, time.time_ns, partial=partial)

    @property
    def can_be_sealed(self) -> bool:
        """Whether the log is not sealed, and a seal can be added without cutting off records."""
        return not (self.sealed or self._index.cut_records)

    def size_on_disk(self) -> int:
        """The size of the three files together, in bytes."""
        return sum(os.fstat(fd).st_size for fd in (*self._data.values(), self._index.fd))

    def remove(self, directory: Path, *, force: bool) -> None:
        """Remove the files, which stand in `directory`; see `remove_files` for errors."""
        remove_files(directory, self._index.fd, force=force)

    def close(self) -> None:
        """Close the files. A second call does nothing. No other call may be under way."""
        for fd in self.let_go():
            os.close(fd)

    def let_go(self) -> list[int]:
        """Hand the descriptors to the caller, who closes them. Returns none the second time.

        No other call may be under way.
        """
        fds = [*self._data.values(), self._index.fd] if self._data else []
        self._data = {}
        return fds

    def to_sync(self) -> list[int]:
        """The descriptors of the files to sync: the data files with output, and the index.

        None if there is no output.
        """
        data = [fd for stream, fd in self._data.items() if self._written[stream]]
        return [*data, self._index.fd] if data else []

    @property
    def last(self) -> Record:
        """The state of the log as readers can see it."""
        return self._index.last

    @property
    def written_bytes(self) -> int:
        """The number of bytes in the data files."""
        return sum(self._written.values())

    @property
    def records(self) -> int:
        """The number of records of the log."""
        return self._index.records

    # --- writing ----------------------------------------------------------------------------

    def append_from_pipe(self, stream: Stream, pipe_fd: int, limit: int) -> int:
        """Move at most `limit` bytes (at least 1) of a pipe to the end of the log.

        Returns how many; 0 if the pipe is empty and has no writer any more. Raises BlockingIOError
        if the pipe is empty, and OutputError if the disk refuses. Some bytes may have been moved
        before an OutputError (`written_bytes`). Only bytes that are in the file have left the pipe:
        splice(2).
        """
        with disk_errors("write"):
            self._index.flush()
            # At an explicit offset: splice refuses files opened for appending (EINVAL).
            count = os.splice(
                pipe_fd,
                self._data[stream],
                limit,
                offset_dst=self._written[stream],
                flags=os.SPLICE_F_NONBLOCK,
            )
            self._written[stream] += count
            self._show_written()
            self._index.flush()
        return count

    def count_discarded(self, count: int) -> None:
        """Count `count` bytes as discarded. Whenever the count has doubled, add it to the index.

        So a process that dies loses at most half of the count, and the index hardly grows. Raises
        nothing if the disk refuses: a full disk is one of the reasons to discard.
        """
        self.discarded_bytes = min(self.discarded_bytes + count, MAX_BYTES)
        if self.discarded_bytes >= 2 * self.last.discarded_bytes:
            self.record_discarded()

    def seal(self) -> None:
        """End the log. If the disk refuses the seal, a later `open` finds the log unsealed."""
        if self.sealed:
            return
        try:
            if self.record_discarded():
                with disk_errors("seal"):
                    self._index.write(evolve(self.last, time_ns=self._clock()))
        except OutputError:
            pass
        self.sealed = True

    def record_discarded(self) -> bool:
        """Write the exact count of discarded bytes to the index. Returns False if that fails."""
        try:
            with disk_errors("write"):
                self._index.flush()
                if self.discarded_bytes != self.last.discarded_bytes:
                    self._index.write(
                        evolve(
                            self.last,
                            time_ns=self._clock(),
                            discarded_bytes=self.discarded_bytes,
                        )
                    )
        except OutputError:
            return False
        return True

    def _show_written(self, time_ns: int | None = None) -> None:
        """Add a record for the bytes of each stream that have none. It stays in memory for now.

        `time_ns` is the time of the records; None: now.
        """
        for stream, length in self._written.items():
            if length > self.last.length_of(stream):
                now_ns = self._clock() if time_ns is None else time_ns
                self._index.add(self.last.with_length(stream, length, now_ns))

    # --- opening ----------------------------------------------------------------------------

    def _load(self) -> None:
        """Load the index, and count what the data files do not have."""
        sizes = {stream: os.fstat(fd).st_size for stream, fd in self._data.items()}
        told, self.sealed = self._index.load(sizes)
        self._written = {stream: self.last.length_of(stream) for stream in Stream}
        self.lost = {stream: max(0, told.length_of(stream) - sizes[stream]) for stream in Stream}
        self.discarded_bytes = max(self.last.discarded_bytes, told.discarded_bytes)

    def _show_all(self) -> None:
        """Add records for bytes that have none, with the time of their file's last change."""
        for stream, fd in self._data.items():
            status = os.fstat(fd)
            self._written[stream] = status.st_size
            self._show_written(status.st_mtime_ns)

    def _recover(self) -> None:
        with disk_errors("recover"):
            self._index.truncate()
            if lost := sum(self.lost.values()):
                self.discarded_bytes = min(self.discarded_bytes + lost, MAX_BYTES)
                self.record_discarded()
            self._show_all()
            with full_disk_may_refuse():  # the records stay in memory; the next write tries again
                self._index.flush()

    # --- reading ----------------------------------------------------------------------------

    def record(self, number: int) -> Record:
        """Record `number` of the log; number -1 is the empty state before the first one.

        Raises OutputError.
        """
        with disk_errors("read"):
            return self._index.record(number)

    def read_stream(
        self, stream: Stream, offset: int, size: int, *, nowait: bool = False
    ) -> bytes | bytearray:
        """Read `size` bytes at `offset` of one stream's file. `nowait` and errors as for `read`."""
        with disk_errors("read"):
            return self._reads.read(self._data[stream], size, offset, nowait=nowait)

    def find(self, offset: int, *, nowait: bool) -> Place:
        """The place at merged `offset`, 0 to `last.size`. `nowait` and errors as for `read`."""
        with disk_errors("read"):
            number = bisect_right(
                range(self.records), offset, key=lambda n: self._index.record(n, nowait=nowait).size
            )
            before = self._index.record(number - 1, nowait=nowait)
        return Place(number, before.stdout_bytes, before.stderr_bytes, offset - before.size)

    def read(
        self, place: Place, view: ReadFilter, *, nowait: bool
    ) -> tuple[LogChunk | None, Place]:
        """Read the next bytes that the filter `view` shows. Returns them and the place after them.

        Reads at most `view.max_bytes` bytes, of at most `BLOCK_RECORDS` records. The chunk is None
        if the filter hides all of these records: read on from the new place, unless it is the end
        of the log. Raises OutputError. With `nowait` it reads only from the page cache (preadv(2),
        RWF_NOWAIT), and raises BlockingIOError if the bytes are not there: then read in a thread.
        """
        if place.number >= self.records:
            return None, place
        with disk_errors("read"):
            block = self._index.block(place.number, nowait=nowait)
            whole = len(block) // RECORD.size * RECORD.size
            try:
                span, after = plan_read(memoryview(block)[:whole], place, view)
            except ValueError as error:
                raise OutputError(f"cannot read the job's output: bad index: {error}") from None
            if span is None:
                return None, after
            data = self._reads.read(
                self._data[span.stream], span.size, span.file_offset, nowait=nowait
            )
        if len(data) < span.size:  # the page cache does not have all of it
            after = span.start.plus(len(data))
        chunk = LogChunk(
            stream=span.stream, offset=span.start.offset, time_ns=span.time_ns, data=data
        )
        return chunk, after
