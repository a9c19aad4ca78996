"""The spool: what a job wrote is what its followers get, and what a crash leaves."""

import errno
import os
import random
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from jobworker.errors import Busy, FollowerStalled, InvalidParams, NotFound, OutputError
from jobworker.jobs.output.batched_wakeups import AT_A_TIME
from jobworker.jobs.output.ended import remove_output, seal_output
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.index import RECORD, LogChunk, Place, ReadFilter
from jobworker.jobs.output.search import Start
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import JobId, Stream

OUT, ERR = Stream.STDOUT, Stream.STDERR
PIECES = [(OUT, b"one\n"), (ERR, b"\x00\xff"), (OUT, b"two"), (OUT, b"3"), (ERR, b"end")]
MERGED = b"one\n\x00\xfftwo3end"


class Clock:
    """Counts instead of telling the time: each record has a stamp of its own."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


def open_fds() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor that listed the directory
            continue
    return found


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that refuses: no file grows beyond `size` (EFBIG, setrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def append(log: Spool | OutputFiles, stream: Stream, data: bytes) -> None:
    """Append through a real pipe; `data` fits in one."""
    read_end, write_end = os.pipe()
    try:
        if data:
            assert os.write(write_end, data) == len(data)
        os.close(write_end)
        while log.append_from_pipe(stream, read_end, 1 << 20):
            pass
    finally:
        os.close(read_end)


def read_all(
    files: OutputFiles,
    place: Place = Place(),  # noqa: B008
    view: ReadFilter = ReadFilter(),  # noqa: B008
) -> list[LogChunk]:
    chunks = []
    while place.offset < files.last.size:
        chunk, place = files.read(place, view, nowait=False)
        if chunk is not None:
            chunks.append(chunk)
    return chunks


def joined(chunks: list[LogChunk], stream: Stream | None = None) -> bytes:
    return b"".join(chunk.data for chunk in chunks if stream in (None, chunk.stream))


async def everything(follower: Follower, max_bytes: int = 65_526) -> list[LogChunk]:
    chunks = []
    while (chunk := await follower.receive(max_bytes)) is not None:
        chunks.append(chunk)
    return chunks


@contextmanager
def written(directory: Path) -> Iterator[OutputFiles]:
    files = OutputFiles.create(directory, clock=Clock())
    try:
        for stream, data in PIECES:
            append(files, stream, data)
        yield files
    finally:
        files.close()


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool.create(tmp_path / "job", clock=Clock())
    yield spool
    spool.close()


# --- bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"\x00", b"no newline", bytes(range(256)) * 100, b"\r\n\n\r", b"\xff\xfe\xc3\x28", b""],
    ids=["nul", "no newline", "binary", "line ends", "not utf-8", "nothing"],
)
async def test_follower_gets_the_exact_bytes(spool: Spool, data: bytes) -> None:
    append(spool, OUT, data)
    await spool.seal()
    with spool.follow() as follower:
        assert joined(await everything(follower)) == data


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


async def test_offsets_outside_the_log_are_refused(spool: Spool) -> None:
    append(spool, OUT, b"abc")
    for offset in (-1, 4):
        with pytest.raises(InvalidParams, match=f"cannot follow from byte {offset}"):
            spool.follow(offset)
    assert spool.statistics().followers == 0


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


async def test_what_is_not_in_the_page_cache_is_read_all_the_same(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(300_000)
    spool = Spool.create(tmp_path / "job")
    for start in range(0, len(data), 50_000):
        append(spool, OUT, data[start : start + 50_000])
    await spool.seal()
    spool.close()
    for name in ("stdout", "stderr", "index"):
        fd = os.open(tmp_path / "job" / name, os.O_RDWR)
        os.fsync(fd)
        # Some pages stay: a read then ends where they end.
        size = os.fstat(fd).st_size
        os.posix_fadvise(fd, 0, 8192, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, size // 2, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    spool = Spool.open(tmp_path / "job")
    with spool.follow() as follower:
        assert joined(await everything(follower)) == data
    spool.close()


async def test_a_file_system_without_nowait_reads_is_served_by_threads() -> None:
    directory = Path("/dev/shm") / f"jobworker-test-spool-{os.getpid()}"  # tmpfs has none
    spool = Spool.create(directory)
    try:
        for stream, data in PIECES:
            append(spool, stream, data)
        await spool.seal()
        with spool.follow(3) as follower:
            assert joined(await everything(follower)) == MERGED[3:]
    finally:
        spool.close()
        for name in ("stdout", "stderr", "index"):
            (directory / name).unlink()
        directory.rmdir()


# --- followers ------------------------------------------------------------------------------


async def test_idle_follower_is_woken_and_busy_one_is_not_poked(spool: Spool) -> None:
    got: list[bytes] = []

    async def follow(follower: Follower) -> None:
        got.extend([bytes(chunk.data) async for chunk in follower])

    with spool.follow() as follower, spool.follow() as stalled:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow, follower)
            await trio.testing.wait_all_tasks_blocked()
            assert spool.statistics().idle_followers == 1
            await spool.write(lambda: append(spool, OUT, b"now"))
            await trio.testing.wait_all_tasks_blocked()
            assert follower.offset == 3
            await spool.seal()
        assert got == [b"now"]
        assert spool.statistics().idle_followers == 0
        assert stalled.offset == 0
        assert joined(await everything(stalled)) == b"now"


async def test_sealing_wakes_all_who_wait(spool: Spool) -> None:
    ended: list[object] = []

    async def follow() -> None:
        with spool.follow() as follower:
            ended.append(await follower.receive())

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        assert spool.statistics().idle_followers == 20
        await spool.seal()
    assert ended == [None] * 20
    assert spool.statistics().followers == 0


async def test_a_cancelled_owner_seals_all_the_same(spool: Spool, tmp_path: Path) -> None:
    append(spool, OUT, b"text")
    with trio.CancelScope() as scope:
        scope.cancel()
        await spool.seal()
        await spool.seal()
    assert spool.sealed
    files = OutputFiles.open(tmp_path / "job")
    assert files.sealed
    files.close()


async def test_cancelled_receive_loses_nothing_and_is_forgotten(spool: Spool) -> None:
    with spool.follow() as follower:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.receive)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert spool.statistics().idle_followers == 0
        append(spool, OUT, b"after")
        spool.wake()
        with trio.CancelScope() as scope:
            scope.cancel()
            await follower.receive()
        assert scope.cancelled_caught
        chunk = await follower.receive()
        assert chunk is not None
        assert chunk.data == b"after"
    assert spool.statistics().followers == 0


async def test_closing_a_follower_ends_its_wait(spool: Spool) -> None:
    follower = spool.follow()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await follower.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        follower.close()
        follower.close()
        statistics = spool.statistics()
        assert (statistics.followers, statistics.idle_followers) == (0, 0)
        spool.wake()  # before the waiting task could run: it must not poke the closed one


async def test_followers_that_close_before_they_are_woken_hold_up_nobody(spool: Spool) -> None:
    """Many are woken a few in each turn of the loop; some leave meanwhile."""
    followers = [spool.follow() for _ in range(5 * AT_A_TIME)]
    ended = 0

    async def follow(follower: Follower) -> None:
        nonlocal ended
        with suppress(trio.ClosedResourceError):
            while await follower.receive():
                pass
            ended += 1

    async with trio.open_nursery() as nursery:
        for follower in followers:
            nursery.start_soon(follow, follower)
        await trio.testing.wait_all_tasks_blocked()
        spool.wake()
        for follower in followers[::2]:
            follower.close()
        await spool.seal()
    assert ended == len(followers) // 2
    for follower in followers:
        follower.close()


async def test_second_task_at_a_follower_is_refused(spool: Spool) -> None:
    with spool.follow() as follower:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.receive)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await follower.receive()
            nursery.cancel_scope.cancel()


async def test_followers_at_one_place_share_the_chunk(spool: Spool) -> None:
    append(spool, OUT, b"shared")
    with spool.follow() as one, spool.follow() as two:
        assert await one.receive() is await two.receive()


async def test_late_follower_gets_more_at_once_where_as_much_again_has_come(spool: Spool) -> None:
    with spool.follow() as first, spool.follow() as second, spool.follow() as third:
        append(spool, OUT, b"12")
        early = await first.receive()
        append(spool, OUT, b"3")
        assert await second.receive() is early, "it is worth no reading for so little"
        append(spool, OUT, b"4")
        late = await third.receive()
        assert late is not None
        assert bytes(late.data) == b"1234"


async def test_late_followers_share_what_can_grow_no_more(spool: Spool) -> None:
    with spool.follow() as first, spool.follow() as second:
        append(spool, OUT, b"12")
        append(spool, ERR, b"much more")
        assert await first.receive() is await second.receive()


async def test_files_close_with_the_last_user(tmp_path: Path) -> None:
    before = open_fds()
    spool = Spool.create(tmp_path / "job")
    append(spool, OUT, b"text")
    await spool.seal()
    follower = spool.follow()
    spool.close()
    with pytest.raises(trio.ClosedResourceError):
        spool.follow()
    inside = set(open_fds().values()) - set(before.values())
    assert {os.path.basename(path) for path in inside} >= {"stdout", "stderr", "index"}
    assert joined(await everything(follower)) == b"text"
    follower.close()
    left = set(open_fds().values()) - set(before.values())
    assert not [path for path in left if str(tmp_path) in path]


async def test_files_stay_open_while_a_thread_uses_them(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "job")
    go_on = threading.Event()

    def work() -> None:
        assert go_on.wait(60)
        append(spool, OUT, b"in time")  # raises where the descriptors are gone

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(spool.write, work)
            await trio.testing.wait_all_tasks_blocked()
            spool.close()
            scope.cancel()  # which the thread outlives
            go_on.set()
    files = OutputFiles.open(tmp_path / "job")
    assert joined(read_all(files)) == b"in time"
    files.close()


async def test_sealed_spool_opens_for_many_and_is_not_changed(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        files.seal()
    index = (tmp_path / "job" / "index").read_bytes()
    for name in ("stdout", "stderr", "index"):
        (tmp_path / "job" / name).chmod(0o400)
    spools = [Spool.open(tmp_path / "job") for _ in range(3)]
    for spool in spools:
        assert spool.sealed
        with spool.follow() as follower:
            assert joined(await everything(follower)) == MERGED
        with pytest.raises(trio.ClosedResourceError):
            await spool.write(lambda: None)
        spool.close()
    assert (tmp_path / "job" / "index").read_bytes() == index


# --- files ----------------------------------------------------------------------------------


def test_files_are_private_and_new(tmp_path: Path) -> None:
    OutputFiles.create(tmp_path / "job").close()
    assert stat.S_IMODE((tmp_path / "job").stat().st_mode) == 0o700
    for name in ("stdout", "stderr", "index"):
        assert stat.S_IMODE((tmp_path / "job" / name).stat().st_mode) == 0o600
    with pytest.raises(OutputError, match="cannot create the job's output: File exists"):
        OutputFiles.create(tmp_path / "job")


def test_a_link_in_the_way_is_not_followed_and_nothing_is_left(tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "index").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="cannot create"):
        OutputFiles.create(job)
    assert os.listdir(job) == ["index"]
    assert not (tmp_path / "elsewhere").exists()


def test_a_linked_file_or_directory_is_not_opened(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        files.seal()
    (tmp_path / "link").symlink_to(tmp_path / "job")
    with pytest.raises(OutputError, match="cannot open"):
        OutputFiles.open(tmp_path / "link")
    (tmp_path / "job" / "stdout").rename(tmp_path / "moved")
    (tmp_path / "job" / "stdout").symlink_to(tmp_path / "moved")
    with pytest.raises(OutputError, match="cannot open"):
        OutputFiles.open(tmp_path / "job")


def test_missing_output_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        OutputFiles.open(tmp_path / "job")
    OutputFiles.create(tmp_path / "job").close()
    (tmp_path / "job" / "stderr").unlink()
    with pytest.raises(NotFound):
        OutputFiles.open(tmp_path / "job")


def test_a_second_writer_is_kept_out(tmp_path: Path) -> None:
    with written(tmp_path / "job"), pytest.raises(Busy, match="it is being written"):
        OutputFiles.open(tmp_path / "job")
    OutputFiles.open(tmp_path / "job").close()


def test_an_empty_pipe_is_not_its_end(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()  # blocking ends: splice must not wait all the same
    with written(tmp_path / "job") as files:
        with pytest.raises(BlockingIOError):
            files.append_from_pipe(OUT, read_end, 100)
        os.close(write_end)
        assert files.append_from_pipe(OUT, read_end, 100) == 0
        os.close(read_end)
        assert files.last.size == len(MERGED)


# --- refusals of the disk -------------------------------------------------------------------


def test_what_a_full_disk_refuses_stays_in_the_pipe(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(10_000)
    read_end, write_end = os.pipe()
    os.write(write_end, data)
    os.close(write_end)
    files = OutputFiles.create(tmp_path / "job")
    with file_size_limit(6_000):
        assert files.append_from_pipe(OUT, read_end, 20_000) == 6_000
        with pytest.raises(OutputError, match="cannot write the job's output: File too large"):
            files.append_from_pipe(OUT, read_end, 20_000)
    assert joined(read_all(files)) == data[:6_000]
    assert files.append_from_pipe(OUT, read_end, 20_000) == 4_000
    assert joined(read_all(files)) == data
    os.close(read_end)
    files.close()


def test_bytes_whose_record_was_refused_are_in_the_log_and_recorded_later(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"abcdef")
    files = OutputFiles.create(tmp_path / "job")
    with file_size_limit(2 * RECORD.size + 5):  # the third record is torn
        assert files.append_from_pipe(OUT, read_end, 1) == 1
        assert files.append_from_pipe(ERR, read_end, 1) == 1
        for _ in range(2):
            with pytest.raises(OutputError):
                files.append_from_pipe(OUT, read_end, 1)
        assert files.last.size == files.written_bytes == 3
        assert joined(read_all(files)) == b"abc"
        files.seal()  # the disk refuses that too
        assert files.sealed
        assert joined(read_all(files)) == b"abc"
    assert (tmp_path / "job" / "index").stat().st_size == 2 * RECORD.size + 5
    files.close()
    files = OutputFiles.open(tmp_path / "job")
    assert not files.sealed
    assert joined(read_all(files)) == b"abc"
    assert files.append_from_pipe(ERR, read_end, 10) == 3
    assert joined(read_all(files), ERR) == b"bdef"
    for fd in (read_end, write_end):
        os.close(fd)
    files.close()


def log_as_told(files: OutputFiles) -> list[tuple[int, Stream, bytes]]:
    chunks = read_all(files, view=ReadFilter(coalesce=False))
    return [(chunk.offset, chunk.stream, bytes(chunk.data)) for chunk in chunks]


@pytest.mark.parametrize("number", range(len(PIECES)))
def test_log_whose_last_record_was_refused_is_the_same_after_a_crash(
    tmp_path: Path, number: int
) -> None:
    files = OutputFiles.create(tmp_path / "job", clock=Clock())
    with file_size_limit(number * RECORD.size + 5):
        for stream, data in PIECES[:number]:
            append(files, stream, data)
        with pytest.raises(OutputError):
            append(files, *PIECES[number])
        told = log_as_told(files)
    files.close()
    assert [piece for _, *piece in told] == [list(piece) for piece in PIECES[: number + 1]]
    ended = OutputFiles.open_ended(tmp_path / "job")
    assert log_as_told(ended) == told
    ended.close()
    files = OutputFiles.open(tmp_path / "job")
    assert log_as_told(files) == told
    files.close()


async def test_follower_gets_what_the_index_could_not_take_and_the_end_tells_of_it(
    spool: Spool, tmp_path: Path
) -> None:
    with file_size_limit(RECORD.size), spool.follow() as follower:
        append(spool, OUT, b"one")
        read_end, write_end = os.pipe()
        os.write(write_end, b"two")
        with pytest.raises(OutputError):
            await spool.write(lambda: spool.append_from_pipe(ERR, read_end, 10))
        os.close(read_end)
        os.close(write_end)
        await spool.write(lambda: spool.count_discarded(4))
        followed = [(await follower.receive(100)) for _ in range(2)]
        await spool.seal()
        assert await follower.receive(100) is None
    assert [bytes(chunk.data) for chunk in followed if chunk] == [b"one", b"two"]
    told = spool.statistics()
    assert (told.stdout_bytes, told.stderr_bytes, told.discarded_bytes) == (3, 3, 4)
    assert (tmp_path / "job" / "index").stat().st_size == RECORD.size
    again = Spool.open_ended(tmp_path / "job", {OUT: 3, ERR: 3})
    again.check_whole()
    with again.follow() as follower:
        assert joined(await everything(follower)) == b"onetwo"
    again.close()


def test_full_disk_at_the_opening_loses_nothing(tmp_path: Path) -> None:
    files = OutputFiles.create(tmp_path / "job")
    append(files, OUT, b"seen")
    files.close()
    with (tmp_path / "job" / "stdout").open("ab") as data:
        data.write(b" unrecorded")
    with file_size_limit(RECORD.size):
        files = OutputFiles.open(tmp_path / "job")
        assert joined(read_all(files)) == b"seen unrecorded"
        with pytest.raises(OutputError):
            append(files, OUT, b" more")
        assert joined(read_all(files)) == b"seen unrecorded"
    append(files, OUT, b" more")
    assert joined(read_all(files)) == b"seen unrecorded more"
    files.close()


async def test_a_log_that_was_cut_from_outside_is_an_error_not_an_end(spool: Spool) -> None:
    append(spool, OUT, b"text")
    await spool.seal()
    fd = next(int(n) for n, path in open_fds().items() if path.endswith("/job/stdout"))
    os.ftruncate(fd, 2)
    with spool.follow() as follower, pytest.raises(OutputError, match="shorter than its index"):
        await everything(follower)


def test_a_damaged_index_is_an_error(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        files.seal()
    raw = bytearray((tmp_path / "job" / "index").read_bytes())
    raw[RECORD.size : 2 * RECORD.size] = bytes(RECORD.size)
    (tmp_path / "job" / "index").write_bytes(raw)
    files = OutputFiles.open(tmp_path / "job")
    with pytest.raises(OutputError, match="record 1 does not follow record 0"):
        read_all(files)
    files.close()


# --- recovery -------------------------------------------------------------------------------


def reopen(directory: Path) -> tuple[bool, list[LogChunk], dict[Stream, bytes]]:
    """Recover, write on, and seal; what stands in the log, and in its files before that."""
    kept = {stream: (directory / stream.name.lower()).read_bytes() for stream in Stream}
    files = OutputFiles.open(directory)
    was_sealed = files.sealed
    chunks = read_all(files, view=ReadFilter(coalesce=False))
    if not was_sealed:
        append(files, OUT, b"more")
        assert joined(read_all(files), OUT) == kept[OUT] + b"more"
        files.seal()
    files.close()
    again = OutputFiles.open(directory)
    assert again.sealed
    assert again.last == files.last
    again.close()
    return was_sealed, chunks, kept


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("discarded", [0, 9])
def test_every_cut_of_the_index_recovers_every_byte(
    tmp_path: Path, sealed: bool, discarded: int
) -> None:
    with written(tmp_path / "model") as files:
        if discarded:
            files.count_discarded(discarded)
        if sealed:
            files.seal()
    index = (tmp_path / "model" / "index").read_bytes()
    streams = {s: b"".join(data for each, data in PIECES if each is s) for s in Stream}
    for cut in range(len(index) + 1):
        job = tmp_path / f"cut{cut}"
        job.mkdir()
        for stream in Stream:
            (job / stream.name.lower()).write_bytes(streams[stream])
        (job / "index").write_bytes(index[:cut])
        was_sealed, chunks, _ = reopen(job)
        assert was_sealed == (sealed and cut == len(index))
        for stream in Stream:
            assert joined(chunks, stream) == streams[stream]
        whole = min(cut // RECORD.size, len(PIECES))
        intact = [(chunk.stream, chunk.data) for chunk in chunks][:whole]
        assert intact == PIECES[:whole]


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize("sealed", [False, True])
def test_every_cut_of_the_data_recovers_what_is_left(
    tmp_path: Path, stream: Stream, sealed: bool
) -> None:
    with written(tmp_path / "model") as files:
        if sealed:
            files.seal()
    contents = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    name = stream.name.lower()
    for cut in range(len(contents[name]) + 1):
        job = tmp_path / f"cut{cut}"
        job.mkdir()
        for each, content in contents.items():
            (job / each).write_bytes(content[:cut] if each == name else content)
        was_sealed, chunks, kept = reopen(job)
        assert was_sealed == (sealed and cut == len(contents[name]))
        for each_stream in Stream:
            assert joined(chunks, each_stream) == kept[each_stream]


def test_zeroes_after_a_power_cut_are_no_records(tmp_path: Path) -> None:
    with written(tmp_path / "job"):
        pass
    with (tmp_path / "job" / "index").open("r+b") as index:
        index.truncate(4096)
    files = OutputFiles.open(tmp_path / "job")
    assert files.records == len(PIECES)
    assert joined(read_all(files)) == MERGED
    files.close()


def test_that_output_was_discarded_survives_the_process(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        for count in (5, 4, 1, 3):
            files.count_discarded(count)
    files = OutputFiles.open(tmp_path / "job")
    assert files.discarded_bytes == 10  # recorded whenever it doubles; the sum, when sealed
    files.count_discarded(2)
    files.seal()
    files.close()
    files = OutputFiles.open(tmp_path / "job")
    assert files.sealed
    assert files.discarded_bytes == 12
    assert joined(read_all(files)) == MERGED
    files.close()


async def test_all_that_was_discarded_survives_a_service_that_leaves(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        spool = Spool(files)
        for count in (5, 4):
            spool.count_discarded(count)
        assert await spool.record_discarded()
        records = files.records
        assert await spool.record_discarded()
        assert files.records == records, "that costs nothing where the index says it"
    files = OutputFiles.open(tmp_path / "job")
    assert files.discarded_bytes == 9
    files.close()


def test_what_was_discarded_and_what_is_missing_both_count(tmp_path: Path) -> None:
    with written(tmp_path / "job"):
        pass
    os.truncate(tmp_path / "job" / "stdout", 4)
    spool = Spool.open(tmp_path / "job")
    lost = spool.lost_bytes
    assert lost
    spool.restore_discarded(100)  # by the record, which is of before
    assert spool.statistics().discarded_bytes == 100 + lost
    spool.close()


def test_what_the_index_said_of_discarded_bytes_stays_told_where_records_go_with_their_output(
    tmp_path: Path,
) -> None:
    """A power cut has left less output than records, and those after the gap are cut."""
    with written(tmp_path / "job") as files:
        files.count_discarded(5000)
    os.truncate(tmp_path / "job" / "stdout", 4)
    for _ in range(2):
        spool = Spool.open(tmp_path / "job")
        assert spool.statistics().discarded_bytes == 5000 + len(b"two3")
        spool.close()


# --- ended jobs' files that another hand has changed ----------------------------------------


def tree_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("sizes", "there", "missing"),
    [
        ({}, (b"out one out two ", b"err one err two "), ""),
        ({"stdout": 5}, (b"out o", b"err one err two "), "11 of 16 bytes of stdout"),
        ({"stderr": 0}, (b"out one out two ", b""), "16 of 16 bytes of stderr"),
        ({"index": 0}, (b"out one out two ", b"err one err two "), ""),
        ({"index": RECORD.size + 3}, (b"out one out two ", b"err one err two "), ""),
        ({"index": None}, (b"out one out two ", b"err one err two "), ""),
        ({"stdout": None}, (b"", b"err one err two "), "16 of 16 bytes of stdout"),
        (
            {"stdout": 0, "stderr": 0, "index": 0},
            (b"", b""),
            "16 of 16 bytes of stdout and 16 of 16 bytes of stderr",
        ),
    ],
)
async def test_what_there_is_of_an_ended_log_is_read_and_what_is_missing_told(
    tmp_path: Path, sizes: dict[str, int | None], there: tuple[bytes, bytes], missing: str
) -> None:
    directory = tmp_path / "job"
    files = OutputFiles.create(directory)
    for words in (b"one ", b"two "):
        append(files, OUT, b"out " + words)
        append(files, ERR, b"err " + words)
    files.seal()
    files.close()
    for name, size in sizes.items():
        if size is None:
            (directory / name).unlink()
        else:
            os.truncate(directory / name, size)
    before = tree_of(directory)
    if None not in sizes.values():
        seal_output(directory)  # as a service does at its start
    spool = Spool.open_ended(directory, {OUT: 16, ERR: 16})
    with spool.follow() as follower:
        chunks = await everything(follower)
        assert (joined(chunks, OUT), joined(chunks, ERR)) == there
        if missing:
            with pytest.raises(OutputError, match=missing):
                follower.check_whole()
        else:
            follower.check_whole()
    spool.close()
    if missing:
        assert tree_of(directory) == before


def test_live_log_that_has_become_shorter_says_by_how_much(tmp_path: Path) -> None:
    files = OutputFiles.create(tmp_path / "job")
    append(files, OUT, b"kept and lost")
    append(files, ERR, b"err")
    files.close()
    os.truncate(tmp_path / "job" / "stdout", 4)
    spool = Spool.open(tmp_path / "job")
    assert spool.lost_bytes == spool.statistics().discarded_bytes == 9
    append(spool, OUT, b" on")
    spool.close()
    again = Spool.open(tmp_path / "job")
    assert (again.lost_bytes, again.statistics().discarded_bytes) == (0, 9)
    assert again.statistics().stdout_bytes == len(b"kept on")
    again.close()


# --- on the disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_removed", [True, False])
async def test_removed_files_are_closed_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    """Their last close frees what they had on the disk and in the page cache."""
    spool = Spool.create(tmp_path / "job")
    append(spool, OUT, b"x" * 1000)
    await spool.seal()
    follower = spool.follow()
    spool.close()
    if is_removed:
        remove_output(tmp_path / "job", force=True, ended=True)
    closed, all_closed, close = dict[int, int](), threading.Event(), os.close
    files = {*spool._files.to_sync(), *spool._files._data.values()}

    def tell(file: int) -> None:
        close(file)
        closed[file] = threading.get_ident()
        if files <= closed.keys():
            all_closed.set()

    monkeypatch.setattr(os, "close", tell)
    follower.close()
    assert not spool.has_files
    assert await trio.to_thread.run_sync(all_closed.wait, 20)
    here = threading.get_ident()
    assert {closed[file] == here for file in files} == {not is_removed}


async def test_follower_whose_files_others_need_is_told_so_and_holds_none(
    tmp_path: Path,
) -> None:
    spool, begun, go_on = Spool.create(tmp_path / "job"), threading.Event(), threading.Event()
    append(spool, OUT, b"x" * 1000)
    await spool.seal()
    closed, last = list[bool](), spool.follow()
    with spool.follow() as behind, spool.follow() as another:
        await behind.receive(1)
        spool.close()
        spool.lend(lambda: closed.append(True))

        def wait() -> None:
            begun.set()
            assert go_on.wait(20)

        async def read() -> None:
            with spool.in_use():  # as for what is not in the page cache
                await trio.to_thread.run_sync(wait)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.to_thread.run_sync(begun.wait)
            spool.shut_out()
            last.close()
            assert not closed, "a thread reads"
            go_on.set()
        assert (closed, spool.has_files) == ([True], False)
        for each in (behind, another):
            with pytest.raises(FollowerStalled, match="follow again from the offset"):
                await each.receive()
        with pytest.raises(FollowerStalled):
            spool.follow()
        with pytest.raises(FollowerStalled):
            await spool.find_start(Start(tail_lines=1))
        assert behind.offset == 1
    assert closed == [True]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that the disk was asked to take."""
    seen: list[str] = []

    def fdatasync(file: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return seen


async def test_nothing_is_synced_where_there_is_no_output(spool: Spool, synced: list[str]) -> None:
    await spool.seal()
    async with spool.synced(JobId(1), "alice"):
        pass
    assert synced == []


async def test_each_file_with_output_is_synced_beside_what_the_caller_does(
    spool: Spool, synced: list[str]
) -> None:
    append(spool, ERR, b"text")
    await spool.seal()
    async with spool.synced(JobId(1), "alice"):
        with trio.fail_after(5):
            while len(synced) < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)
    assert (sorted(synced), spool.sync_fault) == (["index", "stderr"], "")


async def test_disk_that_hangs_delays_no_end_for_long_and_keeps_the_files_open(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda _: go_on.wait(20))
    monkeypatch.setattr("jobworker.jobs.output.sync.SYNC_SECONDS", 0.1)
    append(spool, OUT, b"text")
    await spool.seal()
    with trio.fail_after(5):
        async with spool.synced(JobId(1), "alice"):
            pass
    spool.close()
    assert any(path.endswith("/job/stdout") for path in open_fds().values())
    go_on.set()
    with trio.fail_after(5):
        while any(path.endswith("/job/stdout") for path in open_fds().values()):  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_disk_that_refuses_is_told(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", refuse)
    append(spool, OUT, b"text")
    async with spool.synced(JobId(1), "alice"):
        pass
    assert spool.sync_fault == "its output may not be on the disk: Input/output error"
