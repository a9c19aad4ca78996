"""The disk's word at a job's end: no end waits long for it, and no output is forgotten.

The call to the disk is replaced: one that hangs or refuses at the right moment cannot be had.
"""

import errno
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import Factory, define

from jobworker.jobs.output import sync as output_sync
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import JobId, Stream
from jobworker.threads import REFUSED

from .written_logs import (
    ERR,
    OUT,
    append,
    open_fds,
    spool,
)

__all__ = ["spool"]

HANGING = frozenset("1234")
EVERY = ["index", "stderr", "stdout"]


@define(eq=False)
class Disk:
    """Takes files, as `3/stdout`; those of some jobs not before it `goes_on`."""

    took: list[str] = Factory(list)
    goes_on: threading.Event = Factory(threading.Event)
    hangs: frozenset[str] = HANGING
    refuses: bool = False

    def fdatasync(self, file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if path.parent.name in self.hangs:
            assert self.goes_on.wait(20)
        self.took.append(f"{path.parent.name}/{path.name}")
        if self.refuses:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def has_taken(self, count: int) -> list[str]:
        """What it took, in this order, once that is so much."""
        with trio.fail_after(10):
            while len(self.took) < count:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked(0.05)
        return self.took


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(os, "fdatasync", disk.fdatasync)
    before = open_fds()
    yield disk
    disk.goes_on.set()
    ends_at = time.monotonic() + 10
    while open_fds() != before:  # threads that nobody waits for any more
        assert time.monotonic() < ends_at
        time.sleep(0.01)


async def end(directory: Path, job: int) -> str:
    """Have a job of Alice's write to both of its streams and end: what its record says of that."""
    spool = Spool.create(directory / str(job))
    for stream in Stream:
        append(spool, stream, b"text")
    await spool.seal()
    async with spool.synced(JobId(job), "alice"):
        pass
    spool.close()
    return spool.sync_fault


@asynccontextmanager
async def hanging_places(
    directory: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[None]:
    """Four ends of Alice's have their places and hang; the next ones are told at once."""
    monkeypatch.setattr(output_sync, "SYNC_SECONDS", 100)
    async with trio.open_nursery() as nursery:
        for job in HANGING:
            nursery.start_soon(end, directory, int(job))
        await trio.testing.wait_all_tasks_blocked(0.05)
        monkeypatch.setattr(output_sync, "SYNC_SECONDS", 0)
        yield
        disk.goes_on.set()


def files_of(*jobs: int) -> list[str]:
    return [f"{job}/{name}" for job in jobs for name in ("stdout", "stderr", "index")]


async def test_what_had_no_place_at_its_end_is_synced_later_in_order(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hanging_places(tmp_path, disk, monkeypatch):
        disk.hangs |= {"7"}
        for job in range(5, 10):
            assert await end(tmp_path, job) == ""
        assert await disk.has_taken(6) == files_of(5, 6), "one job at a time"
        assert not any("/8/" in path for path in open_fds().values()), "whose files are closed"
        shutil.rmtree(tmp_path / "8")  # removed meanwhile
        disk.goes_on.set()
        took = await disk.has_taken(6 + 3 * 6)
    assert [name for name in took if name[0] not in HANGING] == files_of(5, 6, 7, 9)
    assert await end(tmp_path, 10) == "", "the line is served again"
    assert (await disk.has_taken(27))[-3:] == files_of(10)


async def test_file_that_no_thread_had_begun_with_is_synced_later(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was a place, and the system gave no thread in time."""
    refused = threading.Event()

    def start_thread(*_: object, **__: object) -> None:
        refused.set()
        raise RuntimeError(REFUSED)

    monkeypatch.setattr(output_sync, "SYNC_SECONDS", 0.2)
    spool = Spool.create(tmp_path / "5")
    append(spool, Stream.STDOUT, b"text")
    with monkeypatch.context() as patch:
        patch.setattr("trio._threads.start_thread_soon", start_thread)
        async with spool.synced(JobId(5), "alice"):
            pass
        assert refused.is_set()
    spool.close()
    assert sorted(await disk.has_taken(3)) == sorted(files_of(5))


async def test_what_the_disk_refuses_after_the_end_was_told_is_in_the_log(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(output_sync, "SYNC_SECONDS", 0.1)
    disk.refuses = True
    assert await end(tmp_path, 1) == "", "it hangs still"
    disk.goes_on.set()
    await disk.has_taken(3)
    monkeypatch.setattr(output_sync, "SYNC_SECONDS", 0)
    assert await end(tmp_path, 5) == "", "nobody has asked yet"
    await disk.has_taken(6)
    for job in (1, 5):
        said = f"job {job}, whose end was announced before: its output may not be on the disk"
        assert said in caplog.text


async def test_record_says_where_too_many_wait_for_the_disk(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_sync, "LATER_JOBS", 1)
    async with hanging_places(tmp_path, disk, monkeypatch):
        disk.hangs |= {"5"}
        assert await end(tmp_path, 5) == ""
        assert (await end(tmp_path, 6)).startswith("its output may not be on the disk: that of 1")


def test_service_that_ends_says_what_the_disk_was_not_asked_for(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(output_sync, "SYNC_SECONDS", 0)

    async def serve() -> None:
        for job in (1, 5):
            await end(tmp_path, job)
        await trio.testing.wait_all_tasks_blocked(0.05)

    trio.run(serve)
    assert "before the output of jobs 1, 5 was synced" in caplog.text


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
