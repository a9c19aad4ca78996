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

import errno
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
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
from jobworker.jobs.output.index import (
    BLOCK_RECORDS,
    EMPTY,
    RECORD,
    LogChunk,
    Place,
    ReadFilter,
    Record,
    plan_read,
)
from jobworker.model.job import Stream


@define(eq=False)
class OutputFiles:
    """The three open files of one job. `records` and `last` describe the log that can be read."""

    _data: dict[Stream, int]
    _index: int
    _clock: Callable[[], int]
    _log: tuple[int, Record] = (0, EMPTY)
    """The number of records and the last one. One tuple, since readers in other threads must see
    both change together."""
    _written: dict[Stream, int] = field(factory=lambda: dict.fromkeys(Stream, 0))
    discarded_bytes: int = 0
    sealed: bool = False
    lost: dict[Stream, int] = field(factory=lambda: dict.fromkeys(Stream, 0))
    """The bytes of each stream that records describe and the data file does not have."""
    _cut_records: int = 0
    """How many records at the end of the index are not part of the log: they do not follow their
    predecessor, or the data files have fewer bytes."""
    _unwritten: Mapping[int, Record] = MappingProxyType({})
    """The log's last records that the index does not have, by number. A writer replaces the mapping
    and never changes it. A reader reads `records` first: a record below that number is either here
    or in the index."""
    _can_read_cache_only: bool = True
    """Whether the file system supports RWF_NOWAIT of preadv(2)."""
    directory: Path = field(default=Path(), kw_only=True)
    """The directory in which the files were opened."""

    @classmethod
    def create(cls, directory: Path, *, clock: Callable[[], int] = time.time_ns) -> Self:
        """Make the files in `directory`; see `create_files`.

        `clock` returns nanoseconds since the epoch. Raises OutputError.
        """
        *data, index = create_files(directory)
        return cls(dict(zip(Stream, data, strict=True)), index, clock, directory=directory)

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
                    files._cut_seal()
                if not files.sealed:
                    files._recover()
            else:
                lock_to_read(files._index)
            undo.pop_all()
        return files

    @classmethod
    def _open(
        cls,
        directory: Path,
        writable: bool,
        clock: Callable[[], int],
        *,
        partial: bool = False,
    ) -> Self:
        *data, index = open_files(directory, writable=writable, partial=partial)
        files = cls(dict(zip(Stream, data, strict=True)), index, clock, directory=directory)
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
            lock_to_read(files._index)
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
        return not (self.sealed or self._cut_records)

    def size_on_disk(self) -> int:
        """The size of the three files together, in bytes."""
        return sum(os.fstat(fd).st_size for fd in (*self._data.values(), self._index))

    def remove(self, directory: Path, *, force: bool) -> None:
        """Remove the files, which stand in `directory`; see `remove_files` for errors."""
        remove_files(directory, self._index, force=force)

    def close(self) -> None:
        """Close the files. A second call does nothing. No other call may be under way."""
        for fd in self.let_go():
            os.close(fd)

    def let_go(self) -> list[int]:
        """Hand the descriptors to the caller, who closes them. Returns none the second time.

        No other call may be under way.
        """
        fds = [*self._data.values(), self._index] if self._data else []
        self._data = {}
        return fds

    def to_sync(self) -> list[int]:
        """The descriptors of the files to sync: the data files with output, and the index.

        None if there is no output.
        """
        data = [fd for stream, fd in self._data.items() if self._written[stream]]
        return [*data, self._index] if data else []

    @property
    def last(self) -> Record:
        """The state of the log as readers can see it."""
        return self._log[1]

    @property
    def written_bytes(self) -> int:
        """The number of bytes in the data files."""
        return sum(self._written.values())

    @property
    def records(self) -> int:
        """The number of records of the log."""
        return self._log[0]

    # --- writing ----------------------------------------------------------------------------

    def append_from_pipe(self, stream: Stream, pipe_fd: int, limit: int) -> int:
        """Move at most `limit` bytes (at least 1) of a pipe to the end of the log.

        Returns how many; 0 if the pipe is empty and has no writer any more. Raises BlockingIOError
        if the pipe is empty, and OutputError if the disk refuses. Some bytes may have been moved
        before an OutputError (`written_bytes`). Only bytes that are in the file have left the pipe:
        splice(2).
        """
        with disk_errors("write"):
            self._flush()
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
            self._flush()
        return count

    def count_discarded(self, count: int) -> None:
        """Count `count` bytes as discarded. Whenever the count has doubled, add it to the index.

        So a process that dies loses at most half of the count, and the index hardly grows. Raises
        nothing if the disk refuses: a full disk is one of the reasons to discard.
        """
        self.discarded_bytes += count
        if self.discarded_bytes >= 2 * self.last.discarded_bytes:
            self.record_discarded()

    def seal(self) -> None:
        """End the log. If the disk refuses the seal, a later `open` finds the log unsealed."""
        if self.sealed:
            return
        try:
            if self.record_discarded():
                with disk_errors("seal"):
                    self._write(evolve(self.last, time_ns=self._clock()))
        except OutputError:
            pass
        self.sealed = True

    def record_discarded(self) -> bool:
        """Write the exact count of discarded bytes to the index. Returns False if that fails."""
        try:
            with disk_errors("write"):
                self._flush()
                if self.discarded_bytes != self.last.discarded_bytes:
                    self._write(
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
                record = self.last.with_length(stream, length, now_ns)
                self._unwritten = {**self._unwritten, self.records: record}
                self._log = (self.records + 1, record)

    def _flush(self) -> None:
        """Write the records that are in memory to the index. Raises OSError."""
        for number, record in self._unwritten.items():
            self._put(number, record)
        if self._unwritten:
            self._unwritten = {}

    def _write(self, record: Record) -> None:
        """Write a record to the index and add it to the log. Raises OSError; then it is in neither.

        The index must have all records before it (`_flush`).
        """
        self._put(self.records, record)
        self._log = (self.records + 1, record)

    def _put(self, number: int, record: Record) -> None:
        # At an explicit offset: after a short write the next attempt overwrites the torn record.
        packed = record.pack()
        done = 0
        while done < RECORD.size:
            done += os.pwrite(self._index, packed[done:], number * RECORD.size + done)

    # --- opening ----------------------------------------------------------------------------

    def _load(self) -> None:
        """Find the last valid record: it follows its predecessor, and its data is there."""
        sizes = self._sizes()
        number = os.fstat(self._index).st_size // RECORD.size
        found = number
        record = self._read_record(number - 1)
        told = EMPTY  # the last record that follows its predecessor, whether its data is there
        while number:
            before = self._read_record(number - 2)
            if record.follows(before):
                told = told if told.time_ns else record
                if all(record.length_of(stream) <= sizes[stream] for stream in Stream):
                    self.sealed = record.seals(before)
                    break
            number, record = number - 1, before
        self._log = (number, record)
        self._cut_records = found - number
        self._written = {stream: record.length_of(stream) for stream in Stream}
        self.lost = {stream: max(0, told.length_of(stream) - sizes[stream]) for stream in Stream}
        self.discarded_bytes = max(record.discarded_bytes, told.discarded_bytes)

    def _sizes(self) -> dict[Stream, int]:
        return {stream: os.fstat(fd).st_size for stream, fd in self._data.items()}

    def _show_all(self) -> None:
        """Add records for bytes that have none, with the time of their file's last change."""
        for stream, fd in self._data.items():
            status = os.fstat(fd)
            self._written[stream] = status.st_size
            self._show_written(status.st_mtime_ns)

    def record(self, number: int) -> Record:
        """Record `number` of the log; number -1 is the empty state before the first one.

        Raises OutputError.
        """
        with disk_errors("read"):
            return self._read_record(number)

    def read_stream(
        self, stream: Stream, offset: int, size: int, *, nowait: bool = False
    ) -> bytes | bytearray:
        """Read `size` bytes at `offset` of one stream's file. `nowait` and errors as for `read`."""
        with disk_errors("read"):
            return self._read(self._data[stream], size, offset, nowait)

    def _read_record(self, number: int, nowait: bool = False) -> Record:
        if number < 0:
            return EMPTY
        if (record := self._unwritten.get(number)) is not None:
            return record
        offset = number * RECORD.size  # a record is never in two pages, so it is read whole
        return Record(*RECORD.unpack(self._read(self._index, RECORD.size, offset, nowait)))

    def _cut_seal(self) -> None:
        number = self.records - 2
        self._log = (number + 1, self._read_record(number))
        self.sealed = False

    def _recover(self) -> None:
        with disk_errors("recover"):
            os.ftruncate(self._index, self.records * RECORD.size)
            if lost := sum(self.lost.values()):
                self.discarded_bytes += lost
                self.record_discarded()
            self._show_all()
            with full_disk_may_refuse():  # the records stay in memory; the next write tries again
                self._flush()

    # --- reading ----------------------------------------------------------------------------

    def find(self, offset: int, *, nowait: bool) -> Place:
        """The place at merged `offset`, 0 to `last.size`. `nowait` and errors as for `read`."""
        with disk_errors("read"):
            number = bisect_right(
                range(self.records), offset, key=lambda n: self._read_record(n, nowait).size
            )
            before = self._read_record(number - 1, nowait)
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
            block = self._read_records(place.number, nowait)
            whole = len(block) // RECORD.size * RECORD.size
            try:
                span, after = plan_read(memoryview(block)[:whole], place, view)
            except ValueError as error:
                raise OutputError(f"cannot read the job's output: bad index: {error}") from None
            if span is None:
                return None, after
            data = self._read(self._data[span.stream], span.size, span.file_offset, nowait)
        if len(data) < span.size:  # the page cache does not have all of it
            after = span.start.plus(len(data))
        chunk = LogChunk(
            stream=span.stream, offset=span.start.offset, time_ns=span.time_ns, data=data
        )
        return chunk, after

    def _read_records(self, first: int, nowait: bool) -> bytes | bytearray:
        """The bytes of at most `BLOCK_RECORDS` records from number `first` on."""
        records, unwritten = self.records, self._unwritten
        count = min(BLOCK_RECORDS, min(unwritten, default=records) - first)
        if count > 0:
            return self._read(self._index, count * RECORD.size, first * RECORD.size, nowait)
        return b"".join(unwritten[number].pack() for number in range(first, records))

    def _read(self, fd: int, size: int, offset: int, nowait: bool) -> bytes | bytearray:
        """Read all `size` bytes, or with `nowait` at least one of them."""
        if not nowait:
            data = os.pread(fd, size, offset)
            if len(data) < size:
                raise OutputError("cannot read the job's output: a file is shorter than its index")
            return data
        if not self._can_read_cache_only:
            raise BlockingIOError
        buffer = bytearray(size)
        try:
            count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # tmpfs, among others
                self._can_read_cache_only = False
                raise BlockingIOError from None
            raise
        if not count:
            raise BlockingIOError  # the file has become shorter: the read in a thread reports it
        del buffer[count:]
        return buffer
