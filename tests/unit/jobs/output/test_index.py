"""The index: it orders the bytes of two streams into one log."""

import os

import pytest

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
