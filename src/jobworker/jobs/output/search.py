"""Where in a log a reader begins: at an offset, at its last lines, or at a moment.

Lines are counted in each stream on its own, since a stream's bytes are what its program wrote: a
line begins with the stream's first byte, and with each byte after a line feed. The last N lines are
those of the N latest first bytes. So a line of one stream that the other interrupts is one line,
and each stream begins at a place of its own: at the merged offset where the first of them begins,
the other may be in the midst of a line that is not wanted.

A line that has not ended goes on after the search. So what a stream starts with is a rule
(`LineStart`), which holds for what comes later too: who begins with none of a line sees nothing of
its rest, and who asks for a time to come sees nothing before it. Who asks for no line at all wants
what comes from now on, all of it: a prompt, or the rest of a row of dots.

What is asked for in several ways begins at the latest of them. Every call reads the disk: the
caller brings a thread, and a `pause` that may raise to end a search that nobody waits for any more.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator

from attrs import frozen

from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.index import BOTH, LineStart, LogChunk, Record
from jobworker.model.job import Stream

BLOCK_BYTES = 65_536
FIRST_WINDOW, MAX_WINDOW = 8, 1024
"""Records that a search for the last lines looks at together, at first and at most."""


@frozen(kw_only=True)
class Start:
    """Where to begin."""

    offset: int = 0
    tail_lines: int | None = None
    since_ns: int | None = None
    """Nanoseconds since the epoch: only lines whose first byte was seen then or later."""
    starts: tuple[LineStart, ...] = ()
    """What an earlier search found, of streams that have not begun; with `offset` alone."""


@frozen
class StartPlace:
    """Where to read from, and what to hide there."""

    offset: int
    """Merged; no stream begins before."""
    starts: tuple[LineStart, ...] = ()


def find_start(
    files: OutputFiles,
    start: Start,
    streams: Collection[Stream] = BOTH,
    pause: Callable[[], None] = lambda: None,
) -> StartPlace:
    """What `start` stands for, in whole lines. Raises OutputError where the disk fails."""
    records = files.records  # once: it may grow meanwhile
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
    """How many of a chunk's bytes come before the first line that begins in it; None where none.

    Errors as for `OutputFiles.read`.
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
    """By bisection: a clock that was set back may make this some place near."""
    return bisect_left(range(records), since_ns, key=lambda number: files.record(number).time_ns)


def _merged(files: OutputFiles, records: int, stream: Stream, offset: int) -> int:
    """The merged offset of a stream's byte; the log's end where it has not come yet."""
    number = bisect_right(
        range(records), offset, key=lambda number: files.record(number).length_of(stream)
    )
    before = files.record(number - 1)
    return before.size + (offset - before.length_of(stream) if number < records else 0)


@frozen
class _Run:
    """Consecutive bytes of one stream: where they stand in its file."""

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
    """Where each stream's first one of the last lines begins in its file; its end if none does.

    The index is searched from its end, a window of records at a time. A window whose lines are all
    wanted is counted by its two ends alone, so that the way through an index of any length costs
    one record and the window's bytes; only the window in which the tail begins is walked record
    by record. Windows grow, for a short tail shall read little.
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
    """How many lines begin within a run, and where the first of them does."""
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
    """Note in `found` where the last lines begin that begin in a window of records."""
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
    """Where a block of a run that ends at `end` starts, and the byte before each of its bytes.

    A line begins where that is a line feed. Before a stream's first byte, where its first line
    begins, stands none: a line feed is put there.
    """
    start = max(run.start, end - BLOCK_BYTES)
    first = max(start - 1, 0)
    before = files.read_stream(run.stream, first, end - 1 - first)
    return start, before if start else b"\n" + before


def _nth_last(data: bytes | bytearray, number: int, count: int) -> int:
    """Where the last but `number - 1` of `count` line feeds stands."""
    if number == count:  # as it mostly is: no look at each
        return data.index(b"\n")
    place = len(data)
    for _ in range(number):
        place = data.rindex(b"\n", 0, place)
    return place


def _runs_backwards(files: OutputFiles, first: int, last: int) -> Iterator[_Run]:
    """The runs of the records from `first` to before `last`, the latest first."""
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
