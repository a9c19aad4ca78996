"""The index of a job's output: what orders the bytes of two streams into one log (pure).

An index is a row of records of 32 bytes. Each is the whole state of the log after one event:
when it was, how long both data files are, how many bytes were thrown away. What grew against
the record before tells the event:

    stdout or stderr grew    so many bytes of output
    discarded grew           output was thrown away: the log is not complete
    nothing grew             sealed: no output follows, and no record

A place in the log is its merged offset: how many bytes of both streams stand before it, in the
order of the index. Since records hold sums, not lengths, the record at an offset is found by
bisection, and the state of a log of any size is its last record.

No I/O here: `output.files` reads and writes what this module describes.
"""

import struct

from attrs import evolve, field, frozen

from jobworker.jobs.output.chunk_encodings import ChunkEncodings
from jobworker.model.job import Stream

RECORD = struct.Struct("<qQQQ")  # time_ns, stdout_bytes, stderr_bytes, discarded_bytes
BLOCK_RECORDS = 1024  # planned over at a time: 32 KiB, well under a millisecond
CHUNK_BYTES = 65_536


BOTH = frozenset(Stream)


@frozen(kw_only=True)
class LogChunk:
    """Consecutive bytes of one stream."""

    stream: Stream
    offset: int
    """The merged offset of the first byte."""
    time_ns: int
    """When the record of the first byte was made, in nanoseconds since the epoch."""
    data: bytes | bytearray
    forms: ChunkEncodings = field(factory=ChunkEncodings, eq=False, repr=False)
    """What its readers made of it, for others who stand at the same place."""

    @property
    def end(self) -> int:
        """The merged offset after the last byte: where a reader goes on."""
        return self.offset + len(self.data)


@frozen
class Record:
    """The state of the log after an event."""

    time_ns: int = 0
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    discarded_bytes: int = 0

    @property
    def size(self) -> int:
        """Bytes of both streams: the merged offset that the record ends at."""
        return self.stdout_bytes + self.stderr_bytes

    def length_of(self, stream: Stream) -> int:
        """Bytes of one stream."""
        return self.stdout_bytes if stream is Stream.STDOUT else self.stderr_bytes

    def with_length(self, stream: Stream, length: int, time_ns: int) -> "Record":
        """The state after `stream` grew to `length` bytes."""
        if stream is Stream.STDOUT:
            return evolve(self, stdout_bytes=length, time_ns=time_ns)
        return evolve(self, stderr_bytes=length, time_ns=time_ns)

    def follows(self, before: "Record") -> bool:
        """Whether one event leads here from `before`: never so for a zeroed record."""
        growth = self._growth(before)
        return self.time_ns > 0 and min(growth) >= 0 and sum(map(bool, growth)) <= 1

    def seals(self, before: "Record") -> bool:
        """Whether the event was the end of the output."""
        return self.time_ns > 0 and not any(self._growth(before))

    def _growth(self, before: "Record") -> tuple[int, int, int]:
        return (
            self.stdout_bytes - before.stdout_bytes,
            self.stderr_bytes - before.stderr_bytes,
            self.discarded_bytes - before.discarded_bytes,
        )

    def pack(self) -> bytes:
        """The record as it stands in the file."""
        return RECORD.pack(self.time_ns, self.stdout_bytes, self.stderr_bytes, self.discarded_bytes)


EMPTY = Record()


@frozen
class Place:
    """Where a reader stands: `skip` bytes after the state that precedes record `number`."""

    number: int = 0
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    skip: int = 0

    @property
    def offset(self) -> int:
        """The merged offset."""
        return self.stdout_bytes + self.stderr_bytes + self.skip

    def plus(self, skip: int) -> "Place":
        """The place `skip` bytes on."""
        return evolve(self, skip=self.skip + skip)


@frozen
class ByteRange:
    """Bytes to read: `size` of one stream, at `start`."""

    stream: Stream
    time_ns: int
    start: Place
    size: int

    @property
    def file_offset(self) -> int:
        """Where the bytes stand in the stream's file."""
        stdout = self.stream is Stream.STDOUT
        return (self.start.stdout_bytes if stdout else self.start.stderr_bytes) + self.start.skip


@frozen
class LineStart:
    """Where a stream begins for a reader: with a line, and what comes before is hidden.

    It is the first line whose first byte stands at `offset` of the stream's file or later, and was
    seen at `since_ns` or later. Where lines are, only the bytes tell: `plan_read` hides what is
    too early, and the reader goes on to the next line (`output.search.bytes_before_line`).
    """

    stream: Stream
    offset: int = 0
    since_ns: int = 0

    def hides(self, time_ns: int, position: int, length: int) -> int:
        """How many of `length` bytes at `position` of the stream, seen at `time_ns`."""
        if time_ns < self.since_ns:
            return length
        return min(length, max(0, self.offset - position))


@frozen
class ReadFilter:
    """What a reader wants to see."""

    max_bytes: int = CHUNK_BYTES
    streams: frozenset[Stream] = BOTH
    coalesce: bool = True
    """Join the records of one stream into one chunk; otherwise each keeps its own time stamp."""
    starts: tuple[LineStart, ...] = ()
    """Of those streams that have not begun."""

    def hides(self, stream: Stream, time_ns: int, position: int, length: int) -> int:
        """How many of `length` bytes at `position` of a stream come before it begins."""
        mine = (each for each in self.starts if each.stream is stream)
        return max((each.hides(time_ns, position, length) for each in mine), default=0)


def plan_read(block: memoryview, place: Place, view: ReadFilter) -> tuple[ByteRange | None, Place]:
    """Choose what to read next, and say where the reader stands after it.

    `block` holds whole records from number `place.number` on. No span means that nothing in the
    block is to be seen; the place is then after the block. Raises ValueError where the records
    contradict one another.
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
