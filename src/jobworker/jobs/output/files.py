"""A job's output on disk: the files `stdout`, `stderr` and `index` of one directory.

Bytes go from the job's pipe to the end of a data file by splice(2), then a record goes to the
end of the index (see `output.index`). What holds:

- Data comes first, its record second. So the index never speaks of bytes that are not there,
  and a process that dies at any moment leaves at most one range of bytes without a record.
- `OutputFiles.open` makes good what a crash left. A torn record is cut. Records that claim more
  than the data files hold are cut. Bytes without a record get one: stdout's, then stderr's,
  stamped with their file's last change. So every byte on disk is in the log; only how the two
  streams interleave within that last range may be lost. A crash of this process alone cuts no
  record but a torn one: where others have to go, the data files have become shorter since
  (a power cut, a repair, a copy put back). `lost` says by how much, and the log counts it as
  discarded.
- `OutputFiles.open_ended` changes nothing. Nobody writes to an ended job's files any more, so what
  is wrong with them is no crash of a writer's, and may be put right by another hand. The records
  that `open` would write stand in memory.
- What the disk refuses stays in the pipe. Where it refuses only the record, the bytes are in the
  log all the same: the record stands in memory, and no write is made before the disk has taken it.
  A process that dies meanwhile changes nothing about the log: `open` makes the same record.

No write waits for the disk. What a power cut may take is what was written since the file system's
last write-back, until the job's end: then the spool has the disk take it all (`Spool.synced`).

One process writes, and a lock keeps others out; within it the caller makes one call at a time
among those that write. Any number of threads may read. Every call may wait for the disk, and
for nothing else: the caller brings a thread.
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
    """The three files of one job, open. `records` and `last` describe what can be read."""

    _data: dict[Stream, int]
    _index: int
    _clock: Callable[[], int]
    # Both in one, because readers in other threads must see them change together.
    _log: tuple[int, Record] = (0, EMPTY)
    _written: dict[Stream, int] = field(factory=lambda: dict.fromkeys(Stream, 0))
    discarded_bytes: int = 0
    sealed: bool = False
    lost: dict[Stream, int] = field(factory=lambda: dict.fromkeys(Stream, 0))
    """Bytes that records speak of and the data files do not have."""
    _cut_records: int = 0
    """Records at the end of the index that are not borne out."""
    _unwritten: Mapping[int, Record] = MappingProxyType({})
    """By number, the log's last records, where the index does not have them; never changed, but
    replaced. Who reads asks for `records` first: a record that is not here then is in the index."""
    _cache_can_be_asked: bool = True
    directory: Path = field(default=Path(), kw_only=True)
    """Where the files stood when they were opened."""

    @classmethod
    def create(cls, directory: Path, *, clock: Callable[[], int] = time.time_ns) -> Self:
        """Make the files (mode 0600) in `directory`, made too where it is missing (mode 0700).

        Raises OutputError where one of them exists, as a link too, or cannot be made; none of
        this call's making is left then. `clock` gives nanoseconds since the epoch.
        """
        *data, index = create_files(directory)
        return cls(dict(zip(Stream, data, strict=True)), index, clock, directory=directory)

    @classmethod
    def open(
        cls, directory: Path, *, goes_on: bool = False, clock: Callable[[], int] = time.time_ns
    ) -> Self:
        """Open the files that stand in `directory`: sealed ones to read, others to go on with.

        Those of a job that `goes_on` are not sealed then: a writer that died may have sealed them,
        and the end was never recorded. Raises NotFound where they are missing, Busy where another
        writer has them, OutputError where the disk fails.
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
        """Open what there is of an ended job's files to read; `lost` says what the index misses.

        An empty file stands for one that is missing. Raises NotFound where the directory is
        missing, OutputError where the disk fails.
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
        """Open what stands in `directory` as it is: nothing is recovered, nothing locked.

        With `partial` an empty file stands for one that is missing. Raises NotFound, OutputError.
        """
        return cls._open(directory, False, time.time_ns, partial=partial)

    @property
    def can_be_sealed(self) -> bool:
        """Whether a seal may be added: no record has to be cut for it."""
        return not (self.sealed or self._cut_records)

    def size_on_disk(self) -> int:
        """Bytes of the three files."""
        return sum(os.fstat(fd).st_size for fd in (*self._data.values(), self._index))

    def remove(self, directory: Path, *, force: bool) -> None:
        """Remove the files, which stand in `directory`; see `remove_files`."""
        remove_files(directory, self._index, force=force)

    def close(self) -> None:
        """Close the files; a second call does nothing. Never while another call runs."""
        for fd in self.let_go():
            os.close(fd)

    def let_go(self) -> list[int]:
        """The files, for the caller to close: none where that was done. Else like `close`."""
        fds = [*self._data.values(), self._index] if self._data else []
        self._data = {}
        return fds

    def to_sync(self) -> list[int]:
        """The files that hold output, which the disk may not have: none where there is none."""
        data = [fd for stream, fd in self._data.items() if self._written[stream]]
        return [*data, self._index] if data else []

    @property
    def last(self) -> Record:
        """The state of the log: what readers can see of it."""
        return self._log[1]

    @property
    def written_bytes(self) -> int:
        """Bytes in the data files."""
        return sum(self._written.values())

    @property
    def records(self) -> int:
        """How many records the log has."""
        return self._log[0]

    # --- writing ----------------------------------------------------------------------------

    def append_from_pipe(self, stream: Stream, pipe_fd: int, limit: int) -> int:
        """Move at most `limit` bytes (at least 1) that stand in a pipe to the end of the log.

        Returns how many; 0 when the pipe is empty and nobody can write to it any more. Raises
        BlockingIOError when it is merely empty, OutputError when the disk refuses: some may have
        been moved then (`written_bytes`). A pipe's bytes are gone from it only as far as they are
        in the file (splice(2)).
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
        """Note that `count` bytes were thrown away; whenever that doubles it, in the index too.

        So a process that dies loses at most half of the count, and the index hardly grows. A full
        disk is one of the reasons to throw away, so its refusal is no error here.
        """
        self.discarded_bytes += count
        if self.discarded_bytes >= 2 * self.last.discarded_bytes:
            self.record_discarded()

    def seal(self) -> None:
        """End the log. Where the disk refuses the last record, a later `open` will recover."""
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
        """Have the index say how much was thrown away: whether the disk took that."""
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
        """Have the log tell of all that is written: a record a stream, in memory for now."""
        for stream, length in self._written.items():
            if length > self.last.length_of(stream):
                now_ns = self._clock() if time_ns is None else time_ns
                record = self.last.with_length(stream, length, now_ns)
                self._unwritten = {**self._unwritten, self.records: record}
                self._log = (self.records + 1, record)

    def _flush(self) -> None:
        """Have the index take the records that stand in memory."""
        for number, record in self._unwritten.items():
            self._put(number, record)
        if self._unwritten:
            self._unwritten = {}

    def _write(self, record: Record) -> None:
        """Add a record, once the index has all before it: the log has it when the disk took it."""
        self._put(self.records, record)
        self._log = (self.records + 1, record)

    def _put(self, number: int, record: Record) -> None:
        # At an explicit offset: after a short write the next try overwrites the torn record.
        packed = record.pack()
        done = 0
        while done < RECORD.size:
            done += os.pwrite(self._index, packed[done:], number * RECORD.size + done)

    # --- opening ----------------------------------------------------------------------------

    def _load(self) -> None:
        """Find the last record that its predecessor and the data files bear out."""
        sizes = self._sizes()
        number = os.fstat(self._index).st_size // RECORD.size
        found = number
        record = self._read_record(number - 1)
        told = EMPTY  # by the last record that its predecessor bears out
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
        """Have the log tell of bytes without a record, stamped with their file's last change."""
        for stream, fd in self._data.items():
            status = os.fstat(fd)
            self._written[stream] = status.st_size
            self._show_written(status.st_mtime_ns)

    def record(self, number: int) -> Record:
        """The state of the log after record `number`; before the first one (-1) it is empty."""
        with disk_errors("read"):
            return self._read_record(number)

    def read_stream(
        self, stream: Stream, offset: int, size: int, *, nowait: bool = False
    ) -> bytes | bytearray:
        """`size` bytes of one stream from `offset` of its file on; errors as for `read`."""
        with disk_errors("read"):
            return self._read(self._data[stream], size, offset, nowait)

    def _read_record(self, number: int, nowait: bool = False) -> Record:
        if number < 0:
            return EMPTY
        if (record := self._unwritten.get(number)) is not None:
            return record
        offset = number * RECORD.size  # never across two pages, so never read in part
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
            with full_disk_may_refuse():  # then the next write tries again
                self._flush()

    # --- reading ----------------------------------------------------------------------------

    def find(self, offset: int, *, nowait: bool) -> Place:
        """The place at merged `offset`, 0 to `last.size`. Errors as for `read`."""
        with disk_errors("read"):
            number = bisect_right(
                range(self.records), offset, key=lambda n: self._read_record(n, nowait).size
            )
            before = self._read_record(number - 1, nowait)
        return Place(number, before.stdout_bytes, before.stderr_bytes, offset - before.size)

    def read(
        self, place: Place, view: ReadFilter, *, nowait: bool
    ) -> tuple[LogChunk | None, Place]:
        """Read the next bytes that `view` shows, and say where the reader stands then.

        At most `view.max_bytes`, from at most BLOCK_RECORDS records. No chunk means that those
        records had nothing to show: go on from the new place unless it is the end of the log.
        With `nowait` nothing but the page cache is read (preadv(2), RWF_NOWAIT), and
        BlockingIOError says that a thread is needed.
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
        if len(data) < span.size:  # the page cache holds no more of it
            after = span.start.plus(len(data))
        chunk = LogChunk(
            stream=span.stream, offset=span.start.offset, time_ns=span.time_ns, data=data
        )
        return chunk, after

    def _read_records(self, first: int, nowait: bool) -> bytes | bytearray:
        """At most BLOCK_RECORDS records as they stand in the file."""
        records, unwritten = self.records, self._unwritten
        count = min(BLOCK_RECORDS, min(unwritten, default=records) - first)
        if count > 0:
            return self._read(self._index, count * RECORD.size, first * RECORD.size, nowait)
        return b"".join(unwritten[number].pack() for number in range(first, records))

    def _read(self, fd: int, size: int, offset: int, nowait: bool) -> bytes | bytearray:
        """All `size` bytes, or with `nowait` at least one of them."""
        if not nowait:
            data = os.pread(fd, size, offset)
            if len(data) < size:
                raise OutputError("cannot read the job's output: a file is shorter than its index")
            return data
        if not self._cache_can_be_asked:
            raise BlockingIOError
        buffer = bytearray(size)
        try:
            count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # tmpfs, among others
                self._cache_can_be_asked = False
                raise BlockingIOError from None
            raise
        if not count:
            raise BlockingIOError  # past the end of the file: let the thread find the words
        del buffer[count:]
        return buffer
