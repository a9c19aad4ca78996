"""Find the place in a log where a reader begins: at an offset, at the last lines, or at a time.

Each stream has its own lines, as its program wrote them: a line begins with the stream's first
byte, and with each byte after a line feed. The last N lines are the lines whose first bytes are the
N latest in the log. A line stays one line if the other stream interrupts it. So each stream has a
beginning of its own: at the merged offset where the first stream begins, the other may be in the
middle of a line that the reader does not want.

A line that has not ended may go on after the search. So the result for a stream is a rule
(`LineStart`), not an offset: it also applies to bytes that arrive later. A reader whose first line
begins later sees nothing of the rest of the present line. A reader that asks for a time in the
future sees nothing from before it. The exception is a reader that asks for the last 0 lines: it
gets all bytes from now on, such as the rest of a prompt or of a row of dots.

If a reader combines several conditions, the latest place counts. Every function here reads the
disk, so the caller provides a thread. It also provides `pause`, a function that the search calls
often and that may raise to cancel the search.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator

from attrs import frozen

from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.index import BOTH, LineStart, LogChunk, Record
from jobworker.model.job import Stream

BLOCK_BYTES = 65_536
FIRST_WINDOW, MAX_WINDOW = 8, 1024
"""How many records a search for the last lines examines together: at first, and at most."""


@frozen(kw_only=True)
class Start:
    """The conditions for the place where a reader begins."""

    offset: int = 0
    """The merged offset of the first byte."""
    tail_lines: int | None = None
    """Only the last so many lines of the log; None: all."""
    since_ns: int | None = None
    """Only lines whose first byte was written then or later, in nanoseconds since the epoch."""
    starts: tuple[LineStart, ...] = ()
    """The rules that an earlier search found and that the reader still needs. Only without
    `tail_lines` and `since_ns`."""


@frozen
class StartPlace:
    """The place from which to read, and what to hide after it."""

    offset: int
    """The merged offset of the first byte to read. No stream begins before it."""
    starts: tuple[LineStart, ...] = ()
    """The rule for each stream of which the bytes after `offset` may have to be hidden."""


def find_start(
    files: OutputFiles,
    start: Start,
    streams: Collection[Stream] = BOTH,
    pause: Callable[[], None] = lambda: None,
) -> StartPlace:
    """Find the place that `start` describes. Each of `streams` begins there with a whole line.

    Raises OutputError if the disk fails, and whatever `pause` raises.
    """
    records = files.records  # read once: the log may grow meanwhile
    if start.tail_lines == 0 and start.since_ns is None:
        return StartPlace(max(start.offset, files.record(records - 1).size))
    first = dict.fromkeys(streams, 0)
    if start.since_ns is not None:
        before = files.record(_records_before(files, records, start.since_ns) - 1)
        first = {stream: before.length_of(stream) for stream in streams}
    if start.tail_lines is not None:
        tail = _find_tail(files, records, start.tail_lines, streams, pause)
        first = {stream: max(first[stream], tail[stream]) for stream in streams}
    since_ns = start.since_ns or 0
    starts = (LineStart(stream, offset, since_ns) for stream, offset in first.items())
    return StartPlace(
        max(start.offset, min(_merged(files, records, *item) for item in first.items())),
        tuple(each for each in starts if each.offset or each.since_ns or start.offset),
    )


def bytes_before_line(files: OutputFiles, chunk: LogChunk, *, nowait: bool) -> int | None:
    """How many bytes of a chunk come before the first line that begins in it; None if none does.

    `nowait` and errors: as for `OutputFiles.read`.
    """
    place = files.find(chunk.offset, nowait=nowait)
    position = place.skip + (
        place.stdout_bytes if chunk.stream is Stream.STDOUT else place.stderr_bytes
    )
    if not position or files.read_stream(chunk.stream, position - 1, 1, nowait=nowait) == b"\n":
        return 0
    after = chunk.data.find(b"\n") + 1
    return after if 0 < after < len(chunk.data) else None


def _records_before(files: OutputFiles, records: int, since_ns: int) -> int:
    """The number of records before the time `since_ns`, by bisection.

    If the host's clock was set back, the times are not sorted, and the result is only near.
    """
    return bisect_left(range(records), since_ns, key=lambda number: files.record(number).time_ns)


def _merged(files: OutputFiles, records: int, stream: Stream, offset: int) -> int:
    """The merged offset of the byte at `offset` of a stream; the log's end if it has not come."""
    number = bisect_right(
        range(records), offset, key=lambda number: files.record(number).length_of(stream)
    )
    before = files.record(number - 1)
    return before.size + (offset - before.length_of(stream) if number < records else 0)


@frozen
class _Run:
    """Consecutive bytes of one stream: the offsets in its file of the first and after the last."""

    stream: Stream
    start: int
    end: int


def _find_tail(
    files: OutputFiles,
    records: int,
    lines: int,
    streams: Collection[Stream],
    pause: Callable[[], None],
) -> dict[Stream, int]:
    """The offset in each stream's file where the first of the last `lines` lines begins.

    If none of them belongs to a stream, the result for the stream is its end. The search goes
    through the index from its end, a window of records at a time. If all lines of a window are
    wanted, the records at its two ends are enough to count them, so a window costs one record and
    its bytes of output. Only the window in which the tail begins is examined record by record. The
    first window is small, since most tails are short. The following windows grow.
    """
    after = files.record(records - 1)
    found = {stream: after.length_of(stream) for stream in streams}
    last, size = records, FIRST_WINDOW
    while lines and last > 0:
        pause()
        first = max(0, last - size)
        before = files.record(first - 1)
        counted = {
            stream: _count_lines(
                files, _Run(stream, before.length_of(stream), after.length_of(stream)), pause
            )
            for stream in streams
        }
        count = sum(number for number, _ in counted.values())
        if count > lines:
            _walk_window(files, (first, last), lines, found, pause)
            break
        found.update((stream, place) for stream, (number, place) in counted.items() if number)
        lines -= count
        last, after, size = first, before, min(2 * size, MAX_WINDOW)
    return found


def _count_lines(files: OutputFiles, run: _Run, pause: Callable[[], None]) -> tuple[int, int]:
    """How many lines begin within a run, and the offset of the first one, or of the run's end."""
    total, first, end = 0, run.end, run.end
    while end > run.start:
        pause()
        start, before = _block_before(files, run, end)
        count = before.count(b"\n")
        if count:
            total, first = total + count, start + before.index(b"\n")
        end = start
    return total, first


def _walk_window(
    files: OutputFiles,
    window: tuple[int, int],
    lines: int,
    found: dict[Stream, int],
    pause: Callable[[], None],
) -> None:
    """Store in `found` where the last `lines` lines of a window begin, in each stream's file.

    `window`: the number of its first record, and that after its last one. It has at least so many
    lines.
    """
    for run in _runs_backwards(files, *window):
        end = run.end
        while lines and end > run.start and run.stream in found:
            pause()
            start, before = _block_before(files, run, end)
            count = before.count(b"\n")
            if count:
                found[run.stream] = start + _nth_last(before, min(lines, count), count)
            lines -= min(lines, count)
            end = start
        if not lines:
            break


def _block_before(files: OutputFiles, run: _Run, end: int) -> tuple[int, bytes | bytearray]:
    """The start of a block of a run that ends at `end`, and the byte before each of its bytes.

    A byte begins a line if the byte before it is a line feed. The stream's first byte begins a line
    too but has no byte before it, so the result has a line feed for it.
    """
    start = max(run.start, end - BLOCK_BYTES)
    first = max(start - 1, 0)
    before = files.read_stream(run.stream, first, end - 1 - first)
    return start, before if start else b"\n" + before


def _nth_last(data: bytes | bytearray, number: int, count: int) -> int:
    """The index of the line feed that is number `number` from the end, of `count` line feeds."""
    if number == count:  # the usual case, which needs no loop
        return data.index(b"\n")
    place = len(data)
    for _ in range(number):
        place = data.rindex(b"\n", 0, place)
    return place


def _runs_backwards(files: OutputFiles, first: int, last: int) -> Iterator[_Run]:
    """Yield the runs of the records from `first` to before `last`, the latest first."""
    after = files.record(last - 1)
    run: _Run | None = None
    for before in map(files.record, range(last - 2, first - 2, -1)):
        stream = _grown(before, after)
        if stream is not None:
            start, end = before.length_of(stream), after.length_of(stream)
            if run is not None and run.stream is stream:
                run = _Run(stream, start, run.end)
            else:
                if run is not None:
                    yield run
                run = _Run(stream, start, end)
        after = before
    if run is not None:
        yield run


def _grown(before: Record, after: Record) -> Stream | None:
    return next((s for s in Stream if after.length_of(s) > before.length_of(s)), None)
