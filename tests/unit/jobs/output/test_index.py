"""The index: it orders the bytes of two streams into one log."""

import os

import pytest

from jobworker.jobs.output.index import (
    EMPTY,
    MAX_BYTES,
    RECORD,
    LineStart,
    Place,
    ReadFilter,
    Record,
    plan_read,
)
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import Stream

from .written_logs import (
    ERR,
    MERGED,
    OUT,
    PIECES,
    append,
    everything,
    joined,
    no_descriptor_leaks,
    spool,
)

__all__ = ["no_descriptor_leaks", "spool"]


async def test_streams_stay_apart_and_in_order(spool: Spool) -> None:
    for stream, data in PIECES:
        append(spool, stream, data)
    await spool.seal()
    with spool.follow() as follower:
        chunks = await everything(follower)
    assert [(chunk.stream, chunk.data) for chunk in chunks] == [
        (OUT, b"one\n"),
        (ERR, b"\x00\xff"),
        (OUT, b"two3"),
        (ERR, b"end"),
    ]
    assert [chunk.offset for chunk in chunks] == [0, 4, 6, 10]
    assert [chunk.time_ns for chunk in chunks] == [1, 2, 3, 5]


async def test_without_coalescing_each_record_keeps_its_time(spool: Spool) -> None:
    for stream, data in PIECES:
        append(spool, stream, data)
    await spool.seal()
    with spool.follow(coalesce=False) as follower:
        chunks = await everything(follower)
    assert [(chunk.time_ns, chunk.data) for chunk in chunks] == [
        (number, data) for number, (_, data) in enumerate(PIECES, 1)
    ]


@pytest.mark.parametrize("stream", list(Stream))
async def test_one_stream_alone_can_be_followed(spool: Spool, stream: Stream) -> None:
    for each, data in PIECES:
        append(spool, each, data)
    await spool.seal()
    with spool.follow(streams={stream}) as follower:
        chunks = await everything(follower)
        assert follower.offset == spool.size
    assert joined(chunks) == b"".join(data for each, data in PIECES if each is stream)
    assert all(MERGED[chunk.offset : chunk.end] == chunk.data for chunk in chunks)


@pytest.mark.parametrize("max_bytes", [1, 2, 3, 7, 100])
async def test_every_offset_and_chunk_size_gives_the_rest(spool: Spool, max_bytes: int) -> None:
    for stream, data in PIECES:
        append(spool, stream, data)
    await spool.seal()
    for offset in range(len(MERGED) + 1):
        with spool.follow(offset) as follower:
            chunks = await everything(follower, max_bytes)
        assert joined(chunks) == MERGED[offset:]
        assert all(len(chunk.data) <= max_bytes for chunk in chunks)
        assert [chunk.offset for chunk in chunks] == [
            offset + sum(len(chunk.data) for chunk in chunks[:n]) for n in range(len(chunks))
        ]


@pytest.mark.parametrize("max_bytes", range(1, 11))
async def test_joined_records_keep_within_the_chunk_size(spool: Spool, max_bytes: int) -> None:
    for data in (b"abc", b"def", b"ghi"):
        append(spool, OUT, data)
    await spool.seal()
    with spool.follow() as follower:
        chunks = await everything(follower, max_bytes)
    text = b"abcdefghi"
    expected = [text[n : n + max_bytes] for n in range(0, len(text), max_bytes)]
    assert [chunk.data for chunk in chunks] == expected


async def test_more_records_than_a_block_are_read_in_full(spool: Spool) -> None:
    data = bytes(number % 251 for number in range(3000))
    read_end, write_end = os.pipe()
    os.write(write_end, data)
    for number in range(3000):
        assert spool.append_from_pipe(OUT if number % 3 else ERR, read_end, 1) == 1
    os.close(read_end)
    os.close(write_end)
    await spool.seal()
    with spool.follow() as follower, spool.follow(2500) as late:
        assert joined(await everything(follower)) == data
        assert joined(await everything(late)) == data[2500:]
    with spool.follow(streams={ERR}) as follower:
        assert joined(await everything(follower)) == data[::3]


# --- records: pure ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "follows", "seals"),
    [
        (Record(2, 4, 5, 6), True, True),
        (Record(2, 9, 5, 6), True, False),
        (Record(2, 4, 9, 6), True, False),
        (Record(2, 4, 5, 9), True, False),
        (Record(1, 9, 5, 6), True, False),
        (Record(2, 9, 9, 6), False, False),
        (Record(2, 9, 5, 9), False, False),
        (Record(2, 3, 5, 6), False, False),
        (Record(2, 4, 5, 5), False, False),
        (Record(2, 9, 4, 6), False, False),
        (Record(2, 4, MAX_BYTES, 6), False, False),
        (Record(2, 4, MAX_BYTES - 4, 6), True, False),
        (Record(2, 4, 5, MAX_BYTES + 1), False, False),
        (Record(2, 4, 5, MAX_BYTES), True, False),
        (Record(0, 4, 5, 6), False, False),
        (Record(0, 9, 5, 6), False, False),
    ],
)
def test_record_follows_another_by_one_event(record: Record, follows: bool, seals: bool) -> None:
    before = Record(1, 4, 5, 6)
    assert record.follows(before) is follows
    assert record.seals(before) is seals


def test_record_has_the_lengths_of_its_streams() -> None:
    record = EMPTY.with_length(OUT, 7, 1).with_length(ERR, 5, 2)
    assert record == Record(2, 7, 5, 0)
    assert (record.size, record.length_of(OUT), record.length_of(ERR)) == (12, 7, 5)
    assert RECORD.unpack(record.pack()) == (2, 7, 5, 0)


# --- plans of reads: pure ---------------------------------------------------------------------

LOG = (Record(10, 4, 0, 0), Record(20, 4, 3, 0), Record(30, 9, 3, 0), Record(40, 11, 3, 0))


def plan(place: Place, view: ReadFilter, log: tuple[Record, ...] = LOG) -> tuple[object, Place]:
    """The stream, its offset in the file, the size and time of the next read; and the place."""
    block = b"".join(each.pack() for each in log[place.number :])
    span, after = plan_read(memoryview(block), place, view)
    if span is None:
        return None, after
    return (span.stream, span.file_offset, span.size, span.time_ns), after


def test_read_ends_where_the_other_stream_begins_and_joins_records_of_one() -> None:
    read, place = plan(Place(), ReadFilter())
    assert (read, place) == ((OUT, 0, 4, 10), Place(1, 4, 0, 0))
    read, place = plan(place, ReadFilter())
    assert (read, place) == ((ERR, 0, 3, 20), Place(2, 4, 3, 0))
    read, place = plan(place, ReadFilter())
    assert (read, place) == ((OUT, 4, 7, 30), Place(4, 11, 3, 0))
    assert plan(place, ReadFilter()) == (None, place)


def test_read_within_a_record_goes_on_there() -> None:
    view = ReadFilter(max_bytes=2)
    read, place = plan(Place(2, 4, 3, 1), view)
    assert (read, place, place.offset) == ((OUT, 5, 2, 30), Place(2, 4, 3, 3), 10)
    read, place = plan(place, view)
    assert (read, place.offset) == ((OUT, 7, 2, 30), 12)
    assert plan(place, view)[0] == (OUT, 9, 2, 40)


def test_place_at_the_end_of_a_record_is_that_of_the_next() -> None:
    assert plan(Place(0, 0, 0, 4), ReadFilter()) == ((ERR, 0, 3, 20), Place(2, 4, 3, 0))
    past = Place(0, 0, 0, 6)  # two bytes into the next record
    assert plan(past, ReadFilter())[0] == (ERR, 2, 1, 20)


def test_hidden_stream_is_passed_over_and_splits_nothing() -> None:
    log = (*LOG, Record(50, 11, 4, 0))
    read, place = plan(Place(), ReadFilter(streams=frozenset({ERR})), log)
    assert (read, place) == ((ERR, 0, 3, 20), Place(2, 4, 3, 0))
    read, place = plan(place, ReadFilter(streams=frozenset({ERR})), log)
    assert (read, place) == ((ERR, 3, 1, 50), Place(5, 11, 4, 0))
    assert plan(Place(2, 4, 3, 0), ReadFilter(streams=frozenset({ERR}))) == (
        None,
        Place(4, 11, 3, 0),
    )


def test_records_without_output_are_passed_over() -> None:
    log = (Record(10, 4, 0, 0), Record(20, 4, 0, 7), Record(30, 6, 0, 7), Record(40, 6, 0, 7))
    assert plan(Place(), ReadFilter(), log) == ((OUT, 0, 6, 10), Place(4, 6, 0, 0))


@pytest.mark.parametrize(
    ("start", "read"),
    [
        (LineStart(OUT, offset=0), (OUT, 0, 4, 10)),
        (LineStart(OUT, offset=3), (OUT, 3, 1, 10)),
        (LineStart(OUT, offset=4), (ERR, 0, 3, 20)),
        (LineStart(OUT, since_ns=10), (OUT, 0, 4, 10)),
        (LineStart(OUT, since_ns=11), (ERR, 0, 3, 20)),
        (LineStart(ERR, offset=100), (OUT, 0, 4, 10)),
    ],
)
def test_bytes_before_the_first_line_are_hidden(start: LineStart, read: object) -> None:
    assert plan(Place(), ReadFilter(starts=(start,)))[0] == read


def test_hidden_bytes_of_the_same_stream_end_a_chunk() -> None:
    log = (Record(10, 4, 0, 0), Record(5, 9, 0, 0), Record(30, 11, 0, 0))
    view = ReadFilter(starts=(LineStart(OUT, since_ns=6),))  # the clock was set back for a moment
    read, place = plan(Place(), view, log)
    assert (read, place) == ((OUT, 0, 4, 10), Place(1, 4, 0, 0))
    assert plan(place, view, log) == ((OUT, 9, 2, 30), Place(3, 11, 0, 0))


def test_later_of_two_rules_counts() -> None:
    rules = (LineStart(OUT, offset=1), LineStart(OUT, offset=6), LineStart(ERR, offset=9))
    view = ReadFilter(starts=rules)
    assert view.hides(OUT, 10, 0, 4) == 4
    assert view.hides(OUT, 10, 4, 4) == 2
    assert view.hides(OUT, 10, 6, 4) == 0
    assert ReadFilter().hides(OUT, 10, 0, 4) == 0


def test_rule_within_a_place_counts_from_there() -> None:
    view = ReadFilter(starts=(LineStart(OUT, offset=3),))
    read, _ = plan(Place(0, 0, 0, 2), view)
    assert read == (OUT, 3, 1, 10)


@pytest.mark.parametrize("record", [Record(50, 3, 3, 0), Record(50, 11, 2, 0), Record(50, 12, 4)])
def test_record_that_does_not_follow_is_an_error_that_names_it(record: Record) -> None:
    with pytest.raises(ValueError, match="record 4 does not follow record 3"):
        plan(Place(2, 4, 3, 0), ReadFilter(), (*LOG, record))
