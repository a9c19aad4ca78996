"""Where in a log a reader begins: at an offset, at its last lines, or at a moment.

Lines are counted in each stream on its own, since a stream's bytes are what its program wrote: a
line begins with the stream's first byte, and with each byte after a line feed. The last N lines are
those of the N latest first bytes. So a line of one stream that the other interrupts is one line.

What is asked for in several ways begins at the latest of them. Every call reads the disk: the
caller brings a thread, and a `pause` that may raise to end a search that nobody waits for any more.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator

from attrs import frozen

from jobworker.jobs.output_files import OutputFiles
from jobworker.jobs.output_index import BOTH, Record
from jobworker.model.job import Stream

BLOCK_BYTES = 65_536


@frozen(kw_only=True)
class Start:
    """Where to begin."""

    offset: int = 0
    tail_lines: int | None = None
    since_ns: int | None = None
    """Nanoseconds since the epoch: begin with the first write that was seen then or later."""


def find_start(
    files: OutputFiles,
    start: Start,
    streams: Collection[Stream] = BOTH,
    pause: Callable[[], None] = lambda: None,
) -> int:
    """The merged offset that `start` stands for. Raises OutputError where the disk fails."""
    found = [start.offset]
    if start.since_ns is not None:
        found.append(_offset_since(files, start.since_ns))
    if start.tail_lines is not None:
        found.append(_offset_of_tail(files, start.tail_lines, streams, pause))
    return max(found)


def _offset_since(files: OutputFiles, since_ns: int) -> int:
    """By bisection: a clock that was set back may make this some place near."""
    number = bisect_left(
        range(files.records), since_ns, key=lambda number: files.record(number).time_ns
    )
    return files.record(number - 1).size


@frozen
class _Run:
    """Consecutive bytes of one stream: where they stand in its file, and in the log."""

    stream: Stream
    start: int
    end: int
    offset: int


def _offset_of_tail(
    files: OutputFiles, lines: int, streams: Collection[Stream], pause: Callable[[], None]
) -> int:
    if not lines:
        return files.last.size
    for run in _runs_backwards(files):
        end = run.end
        while end > run.start and run.stream in streams:
            pause()
            start = max(run.start, end - BLOCK_BYTES)
            # The byte before each one: a line begins where that is a line feed, or is none.
            first = max(start - 1, 0)
            before = files.read_stream(run.stream, first, end - 1 - first)
            before = before if start else b"\n" + before
            found = before.count(b"\n")
            if found >= lines:
                place = len(before)
                for _ in range(lines):
                    place = before.rindex(b"\n", 0, place)
                return run.offset + start - run.start + place
            lines -= found
            end = start
    return 0


def _runs_backwards(files: OutputFiles) -> Iterator[_Run]:
    records = files.records  # once: it may grow meanwhile
    after = files.record(records - 1)
    run: _Run | None = None
    for before in map(files.record, range(records - 2, -2, -1)):
        stream = _grown(before, after)
        if stream is not None:
            start, end = before.length_of(stream), after.length_of(stream)
            if run is not None and run.stream is stream:
                run = _Run(stream, start, run.end, before.size)
            else:
                if run is not None:
                    yield run
                run = _Run(stream, start, end, before.size)
        after = before
    if run is not None:
        yield run


def _grown(before: Record, after: Record) -> Stream | None:
    return next((s for s in Stream if after.length_of(s) > before.length_of(s)), None)
