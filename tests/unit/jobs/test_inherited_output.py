"""The output that an earlier service has left: gone on with, sealed, or opened to read."""

import errno
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from attrs import define, evolve

from jobworker.errors import Busy, InternalError, OutOfDescriptors, OutputError
from jobworker.jobs.history.job_note import make_note, read_note
from jobworker.jobs.inheritance import EndedJob
from jobworker.jobs.inherited_output import end_again, end_as_told, lose, open_spool, sync
from jobworker.jobs.output.ended import remove_output
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.output.sync import NOT_SYNCED
from jobworker.model.job import JobId, JobRecord, Stream
from jobworker.model.lifecycle import Reason, State

from ..strategies import record
from .output.written_logs import append, no_descriptor_leaks

__all__ = ["no_descriptor_leaks"]

NOW = datetime(2026, 11, 24, tzinfo=UTC)
RUNS = record(1, State.RUNNING, started_at=NOW - timedelta(hours=1))


@pytest.fixture
def spools(tmp_path: Path) -> Path:
    spools = tmp_path / "spool"
    spools.mkdir()
    return spools


def write(spools: Path, text: bytes = b"text", *, sealed: bool = False, note: bool = False) -> Path:
    """The output of job 1, as an earlier service has left it."""
    directory = spools / "1"
    files = OutputFiles.create(directory)
    append(files, Stream.STDOUT, text)
    if sealed:
        files.seal()
    files.close()
    if note:
        make_note(spools, RUNS)
    return directory


async def opened(directory: Path, *, lives: bool, ended: bool = False) -> tuple[int, JobRecord]:
    """How many bytes the output has that goes on, and the record that tells of it."""
    spool, told = await open_spool(directory, RUNS, NOW, lives=lives, ended=ended)
    size = spool.size
    spool.close()
    return size, told


# --- live jobs --------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
async def test_live_output_goes_on_where_it_stopped(spools: Path, sealed: bool) -> None:
    directory = write(spools, sealed=sealed)
    spool, told = await open_spool(directory, RUNS, NOW, lives=True, ended=False)
    assert (spool.size, spool.sealed, told) == (4, False, RUNS)
    append(spool, Stream.STDOUT, b" on")
    assert spool.size == 7
    spool.close()


async def test_seal_stays_if_the_launcher_has_the_exit(spools: Path) -> None:
    spool, _ = await open_spool(write(spools, sealed=True), RUNS, NOW, lives=True, ended=True)
    assert spool.sealed
    spool.close()


async def test_live_output_that_has_become_shorter_is_told_by_how_much(spools: Path) -> None:
    os.truncate(write(spools) / "stdout", 1)
    size, told = await opened(spools / "1", lives=True)
    assert (size, told.detail) == (
        1,
        "3 bytes of output from before 2026-11-24 00:00:00 UTC are missing",
    )


@pytest.mark.parametrize(
    ("lives", "detail"),
    [(True, "output from before 2026-11-24 00:00:00 UTC is missing"), (False, "")],
)
async def test_missing_output_is_made_anew_with_a_note(
    spools: Path, lives: bool, detail: str
) -> None:
    """A job that has not started has written nothing that could be missing."""
    assert await opened(spools / "1", lives=lives) == (0, evolve(RUNS, detail=detail))
    assert read_note(spools, JobId(1)) == RUNS
    assert list((spools.parent / "set-aside").iterdir()) == []


@pytest.mark.parametrize("ended", [False, True])
async def test_unreadable_output_is_set_aside_and_new_files_are_made(
    spools: Path, caplog: pytest.LogCaptureFixture, ended: bool
) -> None:
    directory = write(spools)
    (directory / "stdout").unlink()
    (directory / "stdout").symlink_to("elsewhere")
    size, told = await opened(directory, lives=True, ended=ended)
    assert (size, "is missing" in told.detail) == (0, True)
    (aside,) = (spools.parent / "set-aside").iterdir()
    assert aside.name.startswith("1-")
    assert (aside / "index").stat().st_size > 0
    assert f"set aside as {aside}" in caplog.text


async def test_output_that_was_removed_before_the_end_was_recorded_is_not_made_again(
    spools: Path,
) -> None:
    write(spools, sealed=True)
    remove_output(spools / "1")
    spool, told = await open_spool(spools / "1", RUNS, NOW, lives=True, ended=True)
    assert (spool.size, told) == (0, evolve(RUNS, output_removed_at=NOW))
    assert sorted(os.listdir(spools)) == ["1.removed"]
    spool.close()


async def test_mark_of_a_job_that_goes_on_counts_for_nothing(spools: Path) -> None:
    write(spools, sealed=True)
    remove_output(spools / "1")
    size, told = await opened(spools / "1", lives=True, ended=False)
    assert (size, told.output_removed_at) == (0, None)
    assert "is missing" in told.detail


def refuse_by(number: int) -> OutputError:
    error = OutputError(f"cannot open the job's output: {os.strerror(number)}")
    error.__cause__ = OSError(number, os.strerror(number))
    return error


@pytest.mark.parametrize(
    "fault",
    [
        refuse_by(errno.EIO),
        refuse_by(errno.ENOSPC),
        refuse_by(errno.ENOMEM),
        OutOfDescriptors("cannot open the job's output: Too many open files"),
        Busy("cannot open the job's output: it is being written"),
    ],
)
@pytest.mark.parametrize("ended", [False, True])
async def test_host_that_lacks_something_keeps_the_service_from_its_start_and_changes_nothing(
    spools: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, ended: bool
) -> None:
    directory = write(spools)

    def refuse(*_: object, **_options: object) -> Spool:
        raise fault

    monkeypatch.setattr(Spool, "open", refuse)
    monkeypatch.setattr(Spool, "open_ended", refuse)
    with pytest.raises(InternalError, match="cannot go on with job 1") as refused:
        await open_spool(directory, RUNS, NOW, lives=True, ended=ended)
    assert "nothing of it was changed" in refused.value.message
    assert refused.value.remedy
    with pytest.raises(InternalError, match="cannot go on with job 1"):
        await lose(spools, record(1) if ended else RUNS, NOW, "lost")
    assert sorted(os.listdir(spools.parent)) == ["spool"]
    assert (directory / "stdout").read_bytes() == b"text"


async def test_output_that_cannot_be_set_aside_is_an_error_that_says_where(spools: Path) -> None:
    directory = write(spools)
    (directory / "stdout").unlink()
    (directory / "stdout").symlink_to("elsewhere")
    (spools.parent / "set-aside").write_text("in the way")
    with pytest.raises(OutputError, match=f"cannot set aside {directory}") as refused:
        await open_spool(directory, RUNS, NOW, lives=True, ended=False)
    assert "set-aside" in refused.value.remedy


# --- jobs that the launcher does not have -----------------------------------------------------


async def test_lost_job_fails_now_and_its_output_is_sealed(spools: Path) -> None:
    write(spools)
    ended = await lose(spools, evolve(RUNS, discarded_bytes=9), NOW, "the host was restarted")
    assert (ended.record.state, ended.record.reason) == (State.FAILED, Reason.LOST)
    assert (ended.record.detail, ended.record.ended_at) == ("the host was restarted", NOW)
    assert (ended.record.stdout_bytes, ended.record.discarded_bytes) == (4, 9)
    assert ended.spool.sealed
    ended.spool.close()
    files = OutputFiles.look_at(spools / "1")
    assert files.sealed
    files.close()


@pytest.mark.parametrize(
    ("sealed_at", "ended_at"),
    [
        (NOW - timedelta(minutes=5), NOW - timedelta(minutes=5)),
        (NOW - timedelta(hours=2), NOW - timedelta(hours=1)),
    ],
)
async def test_lost_job_whose_output_was_sealed_ended_then_but_not_before_its_start(
    spools: Path, sealed_at: datetime, ended_at: datetime
) -> None:
    clock = int(sealed_at.timestamp()) * 10**9
    files = OutputFiles.create(spools / "1", clock=lambda: clock)
    append(files, Stream.STDOUT, b"text")
    files.seal()
    files.close()
    ended = await lose(spools, RUNS, NOW, "lost")
    assert ended.record.ended_at == ended_at
    ended.spool.close()


async def test_lost_job_that_had_not_started_ended_after_it_was_created(spools: Path) -> None:
    write(spools)
    waits = record(1, State.PENDING)
    ended = await lose(spools, waits, waits.created_at - timedelta(days=1), "lost")
    assert ended.record.ended_at == waits.created_at
    ended.spool.close()


async def test_lost_job_without_output_has_an_end_all_the_same(
    spools: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ended = await lose(spools, RUNS, NOW, "lost")
    assert (ended.record.state, ended.record.stdout_bytes) == (State.FAILED, 0)
    assert "job 1: its output is lost" in caplog.text
    caplog.clear()
    await lose(spools, evolve(RUNS, output_removed_at=NOW), NOW, "lost")
    assert "output is lost" not in caplog.text, "it was removed"


async def test_lost_job_whose_output_is_shorter_is_told_of_both(spools: Path) -> None:
    os.truncate(write(spools) / "stdout", 1)
    ended = await lose(spools, RUNS, NOW, "the host was restarted")
    assert "3 bytes of output" in ended.record.detail
    assert ended.record.detail.endswith("the host was restarted")
    assert ended.record.discarded_bytes == 3
    ended.spool.close()


# --- ended jobs -------------------------------------------------------------------------------


async def test_end_of_a_note_says_when_its_output_was_found_removed(spools: Path) -> None:
    end = record(1, ended_at=NOW)
    write(spools, sealed=True)
    told = await end_as_told(spools, end, NOW)
    assert (told.record, told.spool.size) == (end, 4)
    told.spool.close()
    remove_output(spools / "1")
    later = await end_as_told(spools, end, NOW)
    assert later.record.output_removed_at == NOW
    before = evolve(end, output_removed_at=NOW - timedelta(days=1))
    assert (await end_as_told(spools, before, NOW)).record == before, "the first time counts"


@define(eq=False)
class History:
    """Has the end of job 1."""

    record: JobRecord

    async def summary(self, _job: JobId) -> JobRecord | None:
        await trio.lowlevel.checkpoint()
        return self.record


async def test_end_that_the_history_has_is_taken_with_the_output_there_is(spools: Path) -> None:
    history = History(record(1))
    gone = await end_again(spools, history, JobId(1))  # type: ignore[arg-type]
    assert (gone.record, gone.spool.size, gone.spool.sync_fault) == (record(1), 0, "")
    directory = write(spools)
    there = await end_again(spools, history, JobId(1))  # type: ignore[arg-type]
    assert (there.spool.size, there.spool.sealed) == (4, True)
    there.spool.close()
    (directory / "index").unlink()
    (directory / "index").symlink_to("elsewhere")
    unreadable = await end_again(spools, history, JobId(1))  # type: ignore[arg-type]
    assert "may not be on the disk" in unreadable.spool.sync_fault


@pytest.fixture
def refusing_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fdatasync(file: int) -> None:
        if "/2/" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fdatasync)
        yield


async def test_sync_that_fails_is_told_in_the_record_of_that_job_alone(
    spools: Path, refusing_disk: None
) -> None:
    ended = list[EndedJob]()
    for job in (1, 2, 3):
        spool = Spool.create(spools / str(job))
        append(spool, Stream.STDOUT, b"text")
        await spool.seal()
        ended.append(EndedJob(record(job), spool))
    await sync(ended)
    assert [each.record.detail for each in ended] == [
        "",
        f"{NOT_SYNCED}: Input/output error",
        "",
    ]
    for each in ended:
        each.spool.close()
