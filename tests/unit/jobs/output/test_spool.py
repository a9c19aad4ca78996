"""The spool: what a job wrote is what its followers get, and what a crash leaves."""

import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from jobworker.errors import InvalidParams, OutputError
from jobworker.jobs.output.batched_wakeups import AT_A_TIME
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.index import RECORD
from jobworker.jobs.output.spool import Spool

from .written_logs import (
    ERR,
    MERGED,
    OUT,
    PIECES,
    append,
    everything,
    file_size_limit,
    joined,
    no_descriptor_leaks,
    open_fds,
    spool,
    written,
)

__all__ = ["no_descriptor_leaks", "spool"]


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


async def test_offsets_outside_the_log_are_refused(spool: Spool) -> None:
    append(spool, OUT, b"abc")
    for offset in (-1, 4):
        with pytest.raises(InvalidParams, match=f"cannot follow from byte {offset}"):
            spool.follow(offset)
    assert spool.statistics().followers == 0


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


async def test_sealed_spool_opens_for_many_and_is_not_changed(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        files.seal()
    index = (tmp_path / "job" / "index").read_bytes()
    for name in ("stdout", "stderr", "index"):
        (tmp_path / "job" / name).chmod(0o400)
    for each in [Spool.open(tmp_path / "job") for _ in range(3)]:
        assert each.sealed
        with each.follow() as follower:
            assert joined(await everything(follower)) == MERGED
        with pytest.raises(trio.ClosedResourceError):
            await each.write(lambda: None)
        each.close()
    assert (tmp_path / "job" / "index").read_bytes() == index


# --- refusals of the disk -------------------------------------------------------------------


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


async def test_a_log_that_was_cut_from_outside_is_an_error_not_an_end(spool: Spool) -> None:
    append(spool, OUT, b"text")
    await spool.seal()
    fd = next(int(n) for n, path in open_fds().items() if path.endswith("/job/stdout"))
    os.ftruncate(fd, 2)
    with spool.follow() as follower, pytest.raises(OutputError, match="shorter than its index"):
        await everything(follower)


# --- recovery -------------------------------------------------------------------------------


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
