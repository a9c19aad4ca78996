"""The pump: everything that stands in a job's pipes reaches the spool, whatever happens."""

import os
import random
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from attrs import define

from jobworker.errors import OutputError
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.output.index import RECORD, LogChunk
from jobworker.jobs.output.pace import FEW, OutputPace
from jobworker.jobs.output.pump import Pump
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import Stream

OUT, ERR = Stream.STDOUT, Stream.STDERR


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool.create(tmp_path / "job")
    yield spool
    spool.close()


class Job:
    """Both pipes of a job, as the launcher hands them over, and their write ends."""

    def __init__(self) -> None:
        self.read_ends: dict[Stream, int] = {}
        self.write_ends: dict[Stream, int] = {}
        for stream in Stream:
            self.read_ends[stream], self.write_ends[stream] = os.pipe()
            os.set_blocking(self.read_ends[stream], False)

    def write(self, stream: Stream, data: bytes) -> None:
        """Write all of `data`, which fits in the pipe."""
        assert os.write(self.write_ends[stream], data) == len(data)

    def end(self, *streams: Stream) -> None:
        for stream in streams or tuple(self.write_ends):
            os.close(self.write_ends.pop(stream))


@pytest.fixture
def job() -> Iterator[Job]:
    job = Job()
    yield job
    job.end()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that refuses: no file grows beyond `size` (EFBIG, setrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def log_of(spool: Spool, offset: int = 0) -> list[LogChunk]:
    """What a follower receives of a sealed spool."""
    with spool.follow(offset) as follower:
        return [chunk async for chunk in follower]


def joined(chunks: list[LogChunk], stream: Stream | None = None) -> bytes:
    return b"".join(chunk.data for chunk in chunks if stream in (None, chunk.stream))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what threads and the kernel are sure to bring about."""
    while not condition():
        await trio.testing.wait_all_tasks_blocked()


async def until_discarded(spool: Spool, count: int) -> None:
    await until(lambda: spool.statistics().discarded_bytes == count)


async def test_both_streams_are_moved_until_their_writers_are_gone(spool: Spool, job: Job) -> None:
    with Pump(spool, job.read_ends) as pump:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            job.write(OUT, b"out\x00")
            await until(lambda: spool.size == 4)
            job.write(ERR, b"err\xff")
            await until(lambda: spool.size == 8)
            job.end(OUT)
            await trio.testing.wait_all_tasks_blocked()
            job.write(ERR, b"late")
            job.end(ERR)
    await spool.seal()
    assert [(c.stream, c.data) for c in await log_of(spool)] == [
        (OUT, b"out\x00"),
        (ERR, b"err\xfflate"),
    ]


@define(eq=False)
class CountingPace(OutputPace):
    """Says how many moves there were: after the second in a crowd the stream rests already."""

    moves: int = 0

    def rest_after(self, *move: Any) -> float:
        self.moves += 1
        return super().rest_after(*move)

    def has_seen(self, moves: int) -> bool:
        return self.moves == moves


def crowded() -> CountingPace:
    """The pace where moves of many streams have just taken much, of every owner that tests have."""
    pace = CountingPace()
    for owner in ("", "alice"):
        for other in range(2 * FEW):
            pace.rest_after(trio.current_time(), owner, (owner, other), 1.0, 1e-6)
    pace.moves = 0
    return pace


async def test_busy_stream_rests_among_many_and_nothing_of_it_is_lost(
    spool: Spool, job: Job
) -> None:
    with Pump(spool, job.read_ends, pace=crowded()) as pump:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            job.write(OUT, b"w")
            await until(lambda: spool.size == 1)
            job.write(OUT, b"x")
            await until(lambda: spool.size == 2)
            job.write(OUT, b"yz")
            for _ in range(10):
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert spool.size == 2
            nursery.cancel_scope.cancel()
        await pump.drain()
    await spool.seal()
    assert joined(await log_of(spool)) == b"wxyz"


async def test_stream_whose_job_has_exited_does_not_rest(
    spool: Spool, job: Job, mock_clock: trio.testing.MockClock
) -> None:
    """Neither where that becomes known during a rest nor for what still stands in the pipe."""
    pace = crowded()
    with Pump(spool, job.read_ends, pace=pace) as pump:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            for moves in (1, 2):
                job.write(OUT, b"x")
                await until(partial(pace.has_seen, moves))
            job.write(OUT, b"x")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert spool.size == 2, "the control: it rests"
            job.end()
            pump.hurry()
    assert (spool.size, mock_clock.current_time()) == (3, 0)


async def test_what_is_written_after_the_jobs_exit_has_rests_like_any_output(
    spool: Spool, job: Job, mock_clock: trio.testing.MockClock
) -> None:
    pace = crowded()
    with Pump(spool, job.read_ends, pace=pace) as pump:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            for moves in (1, 2, 3):
                job.write(OUT, b"x")
                if moves == 3:
                    pump.hurry()
                await until(partial(pace.has_seen, moves))
            job.write(OUT, b"x")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert spool.size == 3
            nursery.cancel_scope.cancel()
    assert mock_clock.current_time() == 0


async def test_a_real_process_is_recorded_to_the_byte(spool: Spool, job: Job) -> None:
    script = "head -c 3000000 /dev/zero | tr '\\0' x; printf 'no newline' >&2; printf '\\000\\377'"
    process = subprocess.Popen(  # noqa: ASYNC220 - it does not wait
        ["sh", "-c", script], stdout=job.write_ends[OUT], stderr=job.write_ends[ERR]
    )
    job.end()
    with Pump(spool, job.read_ends) as pump:
        await pump.run()
    await spool.seal()
    assert process.wait() == 0
    chunks = await log_of(spool)
    assert joined(chunks, OUT) == b"x" * 3_000_000 + b"\x00\xff"
    assert joined(chunks, ERR) == b"no newline"


@pytest.mark.parametrize("seed", range(5))
async def test_followers_who_join_at_any_time_get_all_without_gap_or_repeat(
    spool: Spool, job: Job, seed: int
) -> None:
    rng = random.Random(seed)
    sent: dict[Stream, bytes] = {OUT: b"", ERR: b""}
    received: list[list[LogChunk]] = []

    async def follow(cap: int) -> None:
        chunks: list[LogChunk] = []
        with spool.follow() as follower:
            while (chunk := await follower.receive(cap)) is not None:
                chunks.append(chunk)
        received.append(chunks)

    async def write() -> None:
        for _ in range(100):
            stream = rng.choice(list(Stream))
            piece = rng.randbytes(rng.choice([1, 10, 1000, 60_000]))
            sent[stream] += piece
            while piece:
                await trio.lowlevel.wait_writable(job.write_ends[stream])
                try:
                    piece = piece[os.write(job.write_ends[stream], piece) :]
                except BlockingIOError:  # less room than a write takes in one piece
                    await trio.lowlevel.checkpoint()
            if rng.random() < 0.2:
                followers.start_soon(follow, rng.choice([1_000, 65_526]))
        job.end()

    for fd in job.write_ends.values():
        os.set_blocking(fd, False)
    async with trio.open_nursery() as followers:
        with Pump(spool, job.read_ends) as pump, spool.follow() as stalled:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                nursery.start_soon(pump.run)
            await spool.seal()
            assert stalled.offset == 0
    received.append(await log_of(spool))
    assert len(received) > 10
    for chunks in received:
        for stream in Stream:
            assert joined(chunks, stream) == sent[stream]
        offset = 0
        for chunk in chunks:
            assert chunk.offset == offset
            offset = chunk.end
    assert len({joined(chunks) for chunks in received}) == 1
    statistics = spool.statistics()
    assert (statistics.followers, statistics.idle_followers) == (0, 0)


async def test_a_stalled_follower_delays_neither_job_nor_follower(spool: Spool, job: Job) -> None:
    got = 0
    with spool.follow() as stalled, spool.follow() as follower, Pump(spool, job.read_ends) as pump:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            first = None
            for _ in range(100):  # far more than a pipe holds: each must have been moved
                job.write(OUT, b"z" * 60_000)
                while got < 60_000:
                    chunk = await follower.receive()
                    assert chunk is not None
                    got += len(chunk.data)
                got = 0
                first = first or await stalled.receive(1)
            job.end()
        await spool.seal()
        assert stalled.offset == 1
        assert sum([len(chunk.data) async for chunk in stalled]) == 6_000_000 - 1


async def test_cancelled_pump_goes_on_where_it_stopped(spool: Spool, job: Job) -> None:
    pump = Pump(spool, job.read_ends)
    sent = b""
    for number in range(50):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            for _ in range(number % 3):  # cancelled before, amid and after a write
                await trio.testing.wait_all_tasks_blocked()
            piece = b"%d," % number
            job.write(OUT, piece)
            sent += piece
            for _ in range(number % 5):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert spool.size == spool.written_bytes <= len(sent)
    job.end()
    await pump.run()
    await spool.seal()
    pump.close()
    assert joined(await log_of(spool)) == sent


async def test_a_pipe_that_is_no_longer_readable_is_waited_for_again(
    spool: Spool, job: Job
) -> None:
    go_on = threading.Event()
    with Pump(spool, job.read_ends) as pump:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(spool.write, partial(go_on.wait, 60))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(pump.run)
            job.write(OUT, b"stolen")
            await trio.testing.wait_all_tasks_blocked()  # the pump saw it, and waits for its turn
            assert os.read(job.read_ends[OUT], 100) == b"stolen"
            go_on.set()
            await spool.write(lambda: None)  # its turn comes after the pump's
            job.write(OUT, b"kept")
            job.end()
    await spool.seal()
    assert joined(await log_of(spool)) == b"kept"


async def test_drain_takes_what_stands_there_from_a_pipe_held_open(spool: Spool, job: Job) -> None:
    with Pump(spool, job.read_ends) as pump:
        job.write(OUT, b"last words")
        job.write(ERR, b"!")
        with trio.CancelScope() as scope:
            scope.cancel()
            await pump.drain()  # on the way out of a cancelled job
        assert (spool.statistics().stdout_bytes, spool.statistics().stderr_bytes) == (10, 1)
        await pump.drain()
    await spool.seal()
    assert joined(await log_of(spool), OUT) == b"last words"


async def test_output_beyond_the_cap_is_discarded_and_the_job_goes_on(
    spool: Spool, job: Job
) -> None:
    with Pump(spool, job.read_ends, max_bytes=10) as pump:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            job.write(OUT, b"0123456")
            await until(lambda: spool.size == 7)
            assert not spool.statistics().truncated
            job.write(ERR, b"abcdefgh")
            await until_discarded(spool, 5)
            for number in range(1, 6):  # more than the pipe holds
                job.write(OUT, b"x" * 60_000)
                await until_discarded(spool, 5 + number * 60_000)
            job.end()
    await spool.seal()
    statistics = spool.statistics()
    assert statistics.truncated
    assert statistics.discarded_bytes == 300_005
    assert (statistics.stdout_bytes, statistics.stderr_bytes) == (7, 3)
    assert joined(await log_of(spool)) == b"0123456abc"


async def test_output_that_just_fills_the_cap_is_not_truncated(spool: Spool, job: Job) -> None:
    job.write(OUT, b"0123456789")
    job.end()
    with Pump(spool, job.read_ends, max_bytes=10) as pump:
        await pump.run()
    await spool.seal()
    assert not spool.statistics().truncated
    assert spool.size == 10


async def test_a_cap_of_nothing_discards_everything(spool: Spool, job: Job) -> None:
    job.write(ERR, b"0123456789")
    job.end()
    with Pump(spool, job.read_ends, max_bytes=0) as pump:
        await pump.run()
    await spool.seal()
    assert (spool.size, spool.statistics().discarded_bytes) == (0, 10)
    assert await log_of(spool) == []


async def test_full_disk_is_told_and_the_caller_may_wait_for_room(spool: Spool, job: Job) -> None:
    data = random.Random(3).randbytes(50_000)
    job.write(OUT, data)
    job.write(ERR, b"warning")
    job.end()
    with Pump(spool, job.read_ends) as pump:
        with file_size_limit(10_000):
            with pytest.raises(OutputError, match="cannot write the job's output"):
                await pump.run()
            with pytest.raises(OutputError):
                await pump.drain()
        await pump.run()
    await spool.seal()
    chunks = await log_of(spool)
    assert joined(chunks, OUT) == data
    assert joined(chunks, ERR) == b"warning"


async def test_full_disk_and_the_caller_may_discard(spool: Spool, job: Job) -> None:
    job.write(OUT, b"x" * 50_000)
    job.end(OUT)
    with Pump(spool, job.read_ends) as pump, file_size_limit(10_000):
        with pytest.raises(OutputError):
            await pump.run()
        pump.discard()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            await until_discarded(spool, 40_000)
            job.write(ERR, b"still running")
            job.end(ERR)
        await spool.seal()
    assert spool.statistics().discarded_bytes == 40_013
    assert joined(await log_of(spool)) == b"x" * 10_000


async def test_each_byte_is_kept_or_discarded_where_the_index_alone_is_refused(
    spool: Spool, job: Job, tmp_path: Path
) -> None:
    budget = OutputBudget(tmp_path)
    with (
        Pump(spool, job.read_ends, budget=budget) as pump,
        spool.follow() as follower,
        file_size_limit(2 * RECORD.size + 5),
    ):
        for data in (b"a", b"b"):
            job.write(OUT, data)
            await pump.drain()
        job.write(OUT, b"c")
        with pytest.raises(OutputError, match="cannot write the job's output"):
            await pump.drain()
        pump.discard()
        job.write(OUT, b"defg")
        await pump.drain()
        assert spool.statistics().stdout_bytes == spool.written_bytes == 3
        assert spool.statistics().discarded_bytes == 4
        followed = [await follower.receive(1) for _ in range(3)]
        await spool.seal()
    assert joined([chunk for chunk in followed if chunk]) == b"abc"
    assert budget.live_bytes == spool.written_bytes + spool.index_bytes
    assert joined(await log_of(spool)) == b"abc"


async def test_spool_goes_on_in_the_next_process(tmp_path: Path, job: Job) -> None:
    before = Spool.create(tmp_path / "next")
    kept = {stream: os.dup(fd) for stream, fd in job.read_ends.items()}  # as the launcher does
    with Pump(before, job.read_ends) as pump:
        job.write(OUT, b"before,")
        await pump.drain()
    before.close()
    job.write(OUT, b"between,")
    after = Spool.open(tmp_path / "next")
    assert not after.sealed
    with Pump(after, kept) as pump:
        job.write(OUT, b"after")
        job.end()
        await pump.run()
    await after.seal()
    assert joined(await log_of(after)) == b"before,between,after"
    assert joined(await log_of(after, 7)) == b"between,after"
    after.close()


async def test_spool_knows_what_the_budget_counts_of_it(
    spool: Spool, job: Job, tmp_path: Path
) -> None:
    """Records of what is thrown away, and of the end, nobody counts."""
    budget = OutputBudget(tmp_path, max_bytes=10_000)
    budget.count(1000)  # another lives
    job.write(OUT, b"x" * 500)
    job.write(ERR, b"y" * 500)
    job.end()
    with Pump(spool, job.read_ends, max_bytes=700, budget=budget) as pump:
        await pump.run()
    await spool.seal()
    assert budget.live_bytes == 1000 + spool.counted_bytes
    assert spool.counted_bytes == 700 + 2 * RECORD.size < 700 + spool.index_bytes
    budget.keep(700 + spool.index_bytes, spool.counted_bytes)
    assert budget.live_bytes == 1000
