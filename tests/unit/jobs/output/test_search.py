"""Where a reader begins, against a model that looks at each byte."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import evolve, frozen
from hypothesis import given
from hypothesis import strategies as st

from jobworker.errors import InvalidParams
from jobworker.jobs.lookup import follow_from
from jobworker.jobs.output import search
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.index import BOTH, RECORD, LineStart, LogChunk, ReadFilter, Record
from jobworker.jobs.output.search import MAX_WINDOW, Start, StartPlace, find_start
from jobworker.jobs.output.spool import READER_THREADS, Spool
from jobworker.model.job import Stream

from .written_logs import append

OUT, ERR = Stream.STDOUT, Stream.STDERR
Pieces = list[tuple[Stream, bytes]]
Streams = frozenset[Stream]

PIECES = st.lists(
    st.tuples(st.sampled_from(Stream), st.text("ab\n", min_size=1, max_size=9).map(str.encode)),
    max_size=12,
)


@contextmanager
def files_of(pieces: Pieces) -> Iterator[OutputFiles]:
    """A log with a record for each piece, at 100, 200, … nanoseconds."""
    times = iter(range(100, 100_000, 100))
    with tempfile.TemporaryDirectory() as directory:
        files = OutputFiles.create(Path(directory) / "job", clock=lambda: next(times))
        try:
            for stream, data in pieces:
                append(files, stream, data)
            yield files
        finally:
            files.close()


@frozen
class Line:
    """A line of one stream, with the time and the merged offset of its first byte."""

    stream: Stream
    time_ns: int
    offset: int
    data: bytes


def lines_of(pieces: Iterable[tuple[Stream, int, bytes]]) -> list[Line]:
    """The lines that pieces of given times make, in the order of their first bytes."""
    lines, open_lines, offset = list[Line](), dict[Stream, int](), 0
    for stream, time_ns, data in pieces:
        for value in data:
            if stream not in open_lines:
                open_lines[stream] = len(lines)
                lines.append(Line(stream, time_ns, offset, b""))
            number = open_lines[stream]
            lines[number] = evolve(lines[number], data=lines[number].data + bytes([value]))
            if value == ord("\n"):
                del open_lines[stream]
            offset += 1
    return lines


def timed(pieces: Pieces) -> list[tuple[Stream, int, bytes]]:
    return [(stream, time_ns, data) for time_ns, (stream, data) in zip(count(100, 100), pieces)]


def wanted(pieces: Pieces, searched: int, start: Start, streams: Streams) -> list[Line]:
    """The lines of `streams` that `start` stands for, where so many pieces were there then."""
    size = sum(len(data) for _, data in pieces[:searched])
    lines = [line for line in lines_of(timed(pieces)) if line.stream in streams]
    if start.tail_lines is not None:
        old = [line for line in lines if line.offset < size]
        lines = lines[max(0, len(old) - start.tail_lines) :]
    return [line for line in lines if line.time_ns >= (start.since_ns or 0)]


async def seen(
    files: OutputFiles, later: Pieces, start: Start, view: ReadFilter, breaks: Sequence[int]
) -> list[Line]:
    """What a reader sees who comes back after so many chunks, each time, as clients do."""
    spool = Spool(files)
    chunks = list[LogChunk]()
    try:
        follower = await follow_from(spool, start, view.streams, view.coalesce)
        offset, starts = follower.offset, follower.starts
        for stream, data in later:
            append(spool, stream, data)
        await spool.seal()
        for chunks_before_break in [*breaks, 1 << 60]:
            with follower:
                for _ in range(chunks_before_break):
                    chunk = await follower.receive(view.max_bytes)
                    if chunk is None:
                        return lines_of((c.stream, c.time_ns, bytes(c.data)) for c in chunks)
                    chunks.append(chunk)
                    offset = chunk.end
                    starts = tuple(each for each in starts if each.stream is not chunk.stream)
            again = Start(offset=offset, starts=starts)
            follower = await follow_from(spool, again, view.streams, view.coalesce)
        raise AssertionError("a log that never ends")
    finally:
        spool.close()


@given(
    pieces=PIECES,
    later=PIECES,
    tail=st.none() | st.integers(1, 8),
    since_ns=st.none() | st.integers(0, 60).map(lambda n: 50 * n),
    streams=st.sampled_from([BOTH, *(frozenset({stream}) for stream in Stream)]),
    max_bytes=st.integers(1, 30),
    breaks=st.lists(st.integers(0, 3), max_size=3),
    sizes=st.tuples(st.integers(1, 5), st.sampled_from([(1, 1), (1, 2), (2, 8), (8, 1024)])),
)
def test_reader_sees_whole_lines_with_the_times_of_their_first_bytes(
    pieces: Pieces,
    later: Pieces,
    tail: int | None,
    since_ns: int | None,
    streams: Streams,
    max_bytes: int,
    breaks: list[int],
    sizes: tuple[int, tuple[int, int]],
) -> None:
    start = Start(tail_lines=tail, since_ns=since_ns)
    view = ReadFilter(max_bytes, streams, coalesce=False)
    expected = wanted(pieces + later, len(pieces), start, streams)
    with pytest.MonkeyPatch.context() as patch, files_of(pieces) as files:
        block, (first, most) = sizes
        patch.setattr(search, "BLOCK_BYTES", block)
        patch.setattr(search, "FIRST_WINDOW", first)
        patch.setattr(search, "MAX_WINDOW", most)
        found = trio.run(partial(seen, files, later, start, view, breaks))
    assert [(each.stream, each.time_ns, each.data) for each in found] == [
        (each.stream, each.time_ns, each.data) for each in expected
    ]


@given(pieces=PIECES, later=PIECES, tail=st.integers(1, 8), breaks=st.lists(st.integers(0, 3)))
def test_joined_pieces_hold_the_same_lines(
    pieces: Pieces, later: Pieces, tail: int, breaks: list[int]
) -> None:
    start = Start(tail_lines=tail)
    expected = wanted(pieces + later, len(pieces), start, BOTH)
    with files_of(pieces) as files:
        found = trio.run(partial(seen, files, later, start, ReadFilter(), breaks))
    for stream in Stream:
        assert b"".join(each.data for each in found if each.stream is stream) == b"".join(
            each.data for each in expected if each.stream is stream
        )


PARTIAL = [(OUT, b"part"), (ERR, b"E"), (OUT, b"ial\nlast no newline")]


def test_tail_counts_a_line_that_the_other_stream_interrupts_as_one() -> None:
    for tail, first in ((0, []), (1, [OUT]), (2, [ERR, OUT]), (3, [OUT, ERR, OUT])):
        with files_of(PARTIAL) as files:
            found = trio.run(partial(seen, files, [], Start(tail_lines=tail), ReadFilter(), []))
        whole = [each.data for each in found]
        assert [each.stream for each in found] == first
        assert whole == [b"part" + b"ial\n", b"E", b"last no newline"][3 - tail :]


def test_search_begins_at_the_first_line_of_all() -> None:
    with files_of(PARTIAL) as files:
        assert find_start(files, Start(tail_lines=2)) == StartPlace(4, (LineStart(OUT, 8),))


def test_readers_at_one_place_see_what_each_asked_for() -> None:
    async def read_by_turns(files: OutputFiles) -> list[bytes | None]:
        spool = Spool(files)
        try:
            with (
                await follow_from(spool, Start(offset=2), BOTH, True) as all_of_it,
                await follow_from(spool, Start(since_ns=300), BOTH, True) as later,
            ):
                append(spool, OUT, b"b\n")
                append(spool, OUT, b"c\n")
                chunks = [await follower.read() for follower in (all_of_it, later, all_of_it)]
                return [None if chunk is None else bytes(chunk.data) for chunk in chunks]
        finally:
            spool.close()

    with files_of([(OUT, b"a\n")]) as files:
        assert trio.run(read_by_turns, files) == [b"b\nc\n", b"c\n", None]


def test_no_line_is_all_that_comes_from_now_on() -> None:
    with files_of([(OUT, b"a\n."), (ERR, b"bb")]) as files:
        later = [(OUT, b".."), (ERR, b"b\n"), (OUT, b".\n")]
        found = trio.run(partial(seen, files, later, Start(tail_lines=0), ReadFilter(), []))
    assert [(each.stream, each.data) for each in found] == [(OUT, b"...\n"), (ERR, b"b\n")]


def test_since_keeps_a_time_to_come() -> None:
    with files_of([(OUT, b"a\n"), (ERR, b"bb")]) as files:
        later = [(ERR, b"b\nc\n"), (OUT, b"d\n"), (OUT, b"e\n")]
        found = trio.run(partial(seen, files, later, Start(since_ns=350), ReadFilter(), []))
    assert [each.data for each in found] == [b"d\n", b"e\n"]


def test_offset_counts_too() -> None:
    with files_of([(OUT, b"a\n"), (OUT, b"b\n"), (OUT, b"c\n")]) as files:
        assert find_start(files, Start(offset=1, tail_lines=2, since_ns=100)).offset == 2
        assert find_start(files, Start(offset=1, tail_lines=2, since_ns=300)).offset == 4
        start = Start(offset=3, tail_lines=2)
        assert [
            each.data for each in trio.run(partial(seen, files, [], start, ReadFilter(), []))
        ] == [b"c\n"]


def test_a_search_can_be_given_up() -> None:
    class GivenUp(Exception):
        pass

    def pause() -> None:
        raise GivenUp

    with files_of([(OUT, b"abc")]) as files, pytest.raises(GivenUp):
        find_start(files, Start(tail_lines=1), BOTH, pause)


def test_tail_of_a_long_index_reads_few_of_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """300,000 records were each read and compared, though the wanted stream had said nothing."""
    with tempfile.TemporaryDirectory() as directory:
        files = OutputFiles.create(Path(directory) / "job")
        try:
            append(files, ERR, b"first\nsecond\n")
            total = 50_000
            index = b"".join(
                Record(n, 2 * n, files.last.stderr_bytes, 0).pack() for n in range(1, total)
            )
            os.pwrite(files._index.fd, index, RECORD.size)
            os.pwrite(files._data[OUT], b".\n" * total, 0)
        finally:
            files.close()
        files = OutputFiles.open(Path(directory) / "job")
        asked: list[int] = []
        record = OutputFiles.record

        def count(self: OutputFiles, number: int) -> Record:
            asked.append(number)
            return record(self, number)

        monkeypatch.setattr(OutputFiles, "record", count)
        try:
            assert find_start(files, Start(tail_lines=1), {ERR}).starts == (LineStart(ERR, 6),)
            assert len(asked) < total / 20
            asked.clear()
            wanted_lines = 40_000
            found = find_start(files, Start(tail_lines=wanted_lines)).starts
            assert set(found) == {
                LineStart(OUT, 2 * (files.last.stdout_bytes // 2 - wanted_lines)),
                LineStart(ERR, files.last.stderr_bytes),
            }
            assert len(asked) < 2 * MAX_WINDOW + total / 20
        finally:
            files.close()


async def test_job_may_end_while_its_log_is_searched(tmp_path: Path) -> None:
    """The execution closes the spool then; the search was an internal fault."""
    spool = Spool.create(tmp_path / "job")
    append(spool, OUT, b"one\ntwo\n")
    for borrower in range(READER_THREADS):
        spool._readers.acquire_on_behalf_of_nowait(borrower)  # the search has to wait
    followers = list[Follower]()

    async def follow() -> None:
        followers.append(await follow_from(spool, Start(tail_lines=1), BOTH, True))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        await spool.seal()
        spool.close()
        for borrower in range(READER_THREADS):
            spool._readers.release_on_behalf_of(borrower)
    (follower,) = followers
    with follower:
        assert [bytes(chunk.data) async for chunk in follower] == [b"two\n"]


async def test_search_that_is_cancelled_leaves_no_follower(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "job")
    for borrower in range(READER_THREADS):
        spool._readers.acquire_on_behalf_of_nowait(borrower)
    with trio.move_on_after(0.05):
        await follow_from(spool, Start(tail_lines=1), BOTH, True)
    assert spool.statistics().followers == 0
    with pytest.raises(InvalidParams, match="the output has 0 bytes"):
        await follow_from(spool, Start(offset=1), BOTH, True)
    assert spool.statistics().followers == 0
    spool.close()
