"""The index of a job's output: it orders the bytes of two streams into one log. Pure.

An index is a sequence of records of 32 bytes. A record is the whole state of the log after one
event: the time of the event, the lengths of both data files, and how many bytes were discarded. The
number that differs from the record before tells the event:

    stdout or stderr grew    the job wrote that many bytes of output
    discarded grew           output was discarded: the log is not complete
    nothing grew             the seal: no output and no record follow

The merged offset of a place in the log is the number of bytes of both streams before it, in the
order of the index. Records hold sums, not lengths. So bisection finds the record at an offset, and
the last record is the state of the log, however long it is.

This module does no I/O: `output.files` reads and writes the files.
"""

import struct

from attrs import evolve, field, frozen

from jobworker.jobs.output.chunk_encodings import ChunkEncodings
from jobworker.model.job import Stream

RECORD = struct.Struct("<qQQQ")  # time_ns, stdout_bytes, stderr_bytes, discarded_bytes
BLOCK_RECORDS = 1024
"""The most records that one read examines: 32 KiB, which take well under a millisecond."""
CHUNK_BYTES = 65_536
MAX_BYTES = 1 << 62
"""More than any file or count of bytes: a record with a larger number is damage. A record has room
for the sum of two such numbers."""
BOTH = frozenset(Stream)


@frozen(kw_only=True)
class LogChunk:
    """Consecutive bytes of one stream."""

    stream: Stream
    offset: int
    """The merged offset of the first byte."""
    time_ns: int
    """The time of the first byte's record, in nanoseconds since the epoch."""
    data: bytes | bytearray
    forms: ChunkEncodings = field(factory=ChunkEncodings, eq=False, repr=False)
    """The messages that readers have made of the chunk, for other readers at the same place."""

    @property
    def end(self) -> int:
        """The merged offset after the last byte, from which a reader goes on."""
        return self.offset + len(self.data)


@frozen
class Record:
    """The state of the log after an event."""

    time_ns: int = 0
    """The time of the event, in nanoseconds since the epoch; 0 only in `EMPTY`."""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    discarded_bytes: int = 0

    @property
    def size(self) -> int:
        """The number of bytes of both streams, which is the merged offset of the log's end."""
        return self.stdout_bytes + self.stderr_bytes

    def length_of(self, stream: Stream) -> int:
        """The number of bytes of one stream."""
        return self.stdout_bytes if stream is Stream.STDOUT else self.stderr_bytes

    def with_length(self, stream: Stream, length: int, time_ns: int) -> "Record":
        """The state after `stream` grew to `length` bytes."""
        if stream is Stream.STDOUT:
            return evolve(self, stdout_bytes=length, time_ns=time_ns)
        return evolve(self, stderr_bytes=length, time_ns=time_ns)

    def follows(self, before: "Record") -> bool:
        """Whether one event leads from `before` to this record. False for a record of zeros."""
        growth = self._growth(before)
        is_possible = self.time_ns > 0 and max(self.size, self.discarded_bytes) <= MAX_BYTES
        return is_possible and min(growth) >= 0 and sum(map(bool, growth)) <= 1

    def seals(self, before: "Record") -> bool:
        """Whether this record, which follows `before`, is the seal."""
        return self.time_ns > 0 and not any(self._growth(before))

    def _growth(self, before: "Record") -> tuple[int, int, int]:
        return (
            self.stdout_bytes - before.stdout_bytes,
            self.stderr_bytes - before.stderr_bytes,
            self.discarded_bytes - before.discarded_bytes,
        )

    def pack(self) -> bytes:
        """The 32 bytes of the record in the index."""
        return RECORD.pack(self.time_ns, self.stdout_bytes, self.stderr_bytes, self.discarded_bytes)


EMPTY = Record()


@frozen
class Place:
    """A place in the log: `skip` bytes into the output of record `number`.

    `stdout_bytes` and `stderr_bytes` are the lengths of the streams before that record.
    """

    number: int = 0
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    skip: int = 0

    @property
    def offset(self) -> int:
        """The merged offset."""
        return self.stdout_bytes + self.stderr_bytes + self.skip

    def plus(self, skip: int) -> "Place":
        """The place `skip` bytes further on, within the same record."""
        return evolve(self, skip=self.skip + skip)


@frozen
class ByteRange:
    """Bytes to read: `size` bytes of one stream from `start` on."""

    stream: Stream
    time_ns: int
    start: Place
    size: int

    @property
    def file_offset(self) -> int:
        """The offset of the first byte in the stream's file."""
        stdout = self.stream is Stream.STDOUT
        return (self.start.stdout_bytes if stdout else self.start.stderr_bytes) + self.start.skip


@frozen
class LineStart:
    """A rule: a reader sees a stream only from the beginning of a certain line on.

    It is the first line whose first byte stands at `offset` of the stream's file or later, and was
    written at `since_ns` or later (nanoseconds since the epoch, by the byte's record). The index
    does not know where lines begin. So `plan_read` hides the bytes that are too early, and the
    reader then skips the rest of a line (`output.search.bytes_before_line`).
    """

    stream: Stream
    offset: int = 0
    since_ns: int = 0

    def hides(self, time_ns: int, position: int, length: int) -> int:
        """How many of `length` bytes at `position` of the stream, from `time_ns`, are hidden."""
        if time_ns < self.since_ns:
            return length
        return min(length, max(0, self.offset - position))


@frozen
class ReadFilter:
    """What a reader wants to see of the log."""

    max_bytes: int = CHUNK_BYTES
    """The most bytes of one chunk."""
    streams: frozenset[Stream] = BOTH
    coalesce: bool = True
    """Join consecutive records of one stream into one chunk, which has the time of the first one.
    Otherwise each record makes a chunk with its own time."""
    starts: tuple[LineStart, ...] = ()
    """The rules for the streams of which the reader has not yet reached the first line."""

    def hides(self, stream: Stream, time_ns: int, position: int, length: int) -> int:
        """How many of `length` bytes at `position` of a stream come before its first line.

        `time_ns` is the time of these bytes.
        """
        mine = (each for each in self.starts if each.stream is stream)
        return max((each.hides(time_ns, position, length) for each in mine), default=0)


def plan_read(block: memoryview, place: Place, view: ReadFilter) -> tuple[ByteRange | None, Place]:
    """Choose the bytes to read next. Returns them, and the reader's place after them.

    `block` holds whole records from number `place.number` on. If the filter `view` hides all bytes
    of the block, the function returns None, and the place after the block. Raises ValueError if a
    record does not follow the one before it.
    """
    number, stdout, stderr, skip = place.number, place.stdout_bytes, place.stderr_bytes, place.skip
    first: ByteRange | None = None
    size = 0
    for time_ns, stdout_end, stderr_end, _ in RECORD.iter_unpack(block):
        stdout_grew, stderr_grew = stdout_end - stdout, stderr_end - stderr
        if stdout_grew < 0 or stderr_grew < 0 or (stdout_grew and stderr_grew):
            raise ValueError(f"record {number} does not follow record {number - 1}")
        length = stdout_grew + stderr_grew - skip
        if length > 0:
            stream = Stream.STDOUT if stdout_grew else Stream.STDERR
            hidden = 0
            if view.starts:
                position = (stdout if stdout_grew else stderr) + skip
                hidden = view.hides(stream, time_ns, position, length)
            if first is None and stream in view.streams and hidden < length:
                skip, length = skip + hidden, length - hidden
                first = ByteRange(stream, time_ns, Place(number, stdout, stderr, skip), 0)
            elif first is not None and (stream is not first.stream or not view.coalesce or hidden):
                break
            if first is not None:
                room = view.max_bytes - size
                size += min(length, room)
                if length >= room:
                    skip += room
                    break
        skip = max(0, -length)
        number, stdout, stderr = number + 1, stdout_end, stderr_end
    span = None if first is None else evolve(first, size=size)
    return span, Place(number, stdout, stderr, skip)
