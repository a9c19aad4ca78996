"""What a service that starts makes of earlier jobs, over a launcher and a history that it plays."""

import errno
import os
import shutil
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest
import trio
from attrs import define, evolve, field

from jobworker.jobs.history.job_note import make_note, write_note
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.takeover import take_over
from jobworker.model.job import JobId, JobRecord, JobSpec, Stream
from jobworker.model.lifecycle import Reason, State
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.service.job_reports import JobExit

from .output.written_logs import append, open_fds

NOW = datetime(2026, 11, 24, tzinfo=UTC)


@define(eq=False)
class NoJobs:
    """A launcher that was started anew."""

    inherited: dict[JobId, tuple[Started, Exits]]
    unstarted: frozenset[JobId] = frozenset()


@define(eq=False)
class EndedJobs:
    """A launcher that has kept jobs which have ended, until it is told to forget them."""

    inherited: dict[JobId, tuple[Started, Exits]]
    done: list[str]
    unstarted: frozenset[JobId] = frozenset()

    @classmethod
    def of(cls, *jobs: int, done: list[str]) -> Self:
        inherited = dict[JobId, tuple[Started, Exits]]()
        for job in jobs:
            send, exits = trio.open_memory_channel[JobExit](1)
            send.send_nowait(JobExit(code=0, signal=None, usage=None))
            (out, out_write), (err, err_write) = os.pipe(), os.pipe()
            os.close(out_write)
            os.close(err_write)
            inherited[JobId(job)] = Started(pid=1, stdout=out, stderr=err), exits
        return cls(inherited, done)

    async def begin_to_remove(self, job: JobId) -> None:
        self.done.append(f"{job} is forgotten")


@define(eq=False)
class OneJob:
    """A history with one job that had not ended, and those that had."""

    unfinished: tuple[JobRecord, ...]
    removed: frozenset[JobId] = frozenset()
    never: set[JobId] = field(factory=set)
    put_records: list[JobRecord] = field(factory=list)
    ended: tuple[JobRecord, ...] = ()
    done: list[str] = field(factory=list)

    async def put(self, record: JobRecord) -> None:
        self.put_records.append(record)
        self.done.append(f"{record.id} is recorded")

    async def summary(self, job: JobId) -> JobRecord | None:
        every = (*self.ended, *self.put_records)
        return next((record for record in every if record.id == job), None)

    async def known(self, _: Collection[JobId]) -> frozenset[JobId]:
        return frozenset(record.id for record in (*self.unfinished, *self.ended))

    async def removed_without_output(self, jobs: Collection[JobId]) -> frozenset[JobId]:
        return self.removed & frozenset(jobs)

    def pass_over(self, _: JobId) -> None:
        return

    def never_give(self, job: JobId) -> None:
        self.never.add(job)


@pytest.mark.parametrize(
    ("known_by", "is_there"), [("history", True), ("history", False), ("note", True)]
)
async def test_lost_job_is_recorded_with_as_much_discarded_as_was_told(
    tmp_path: Path, known_by: str, is_there: bool
) -> None:
    """The index has it whenever it doubles; the record may know of more, or, where a full disk
    refused that, the note.

    Recorded before anybody can ask: the next service would tell of another end.
    """
    spool = Spool.create(tmp_path / "1")
    for count in (5, 4):
        spool.count_discarded(count)
    spool.close()
    record = JobRecord(
        id=JobId(1),
        spec=JobSpec(command=("true",)),
        owner="alice",
        state=State.RUNNING,
        created_at=NOW,
        started_at=NOW,
    )
    make_note(tmp_path, record)
    told = evolve(record, discarded_bytes=9)
    if known_by == "history":
        record = told
    else:
        write_note(tmp_path, told)
    if not is_there:
        shutil.rmtree(tmp_path / "1")
    history = OneJob((record,))
    taken = await take_over(
        NoJobs({}),  # type: ignore[arg-type]
        history,  # type: ignore[arg-type]
        tmp_path,
        NOW,
    )
    (ended,) = taken.ended
    ended.spool.close()
    assert ended.record.reason is Reason.LOST
    assert ended.record.discarded_bytes == 9
    assert history.put_records == [ended.record]


async def test_job_that_waits_again_keeps_its_output_though_a_killed_service_had_sealed_that(
    tmp_path: Path,
) -> None:
    """It was stopped, and the service was killed before the end was recorded: nobody was told."""
    killed = Spool.create(tmp_path / "1")
    await killed.seal()
    killed.close()
    record = JobRecord(id=JobId(1), spec=JobSpec(command=("true",)), owner="alice", created_at=NOW)
    taken = await take_over(
        NoJobs({}),  # type: ignore[arg-type]
        OneJob((record,)),  # type: ignore[arg-type]
        tmp_path,
        NOW,
    )
    (waiting,) = taken.waiting
    assert not waiting.spool.sealed
    append(waiting.spool, Stream.STDOUT, b"text")
    await waiting.spool.seal()
    waiting.spool.close()
    again = Spool.open(tmp_path / "1")
    assert (again.sealed, again.size) == (True, 4)
    again.close()


async def test_program_began_when_the_launcher_said_however_long_it_takes_to_go_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0

    class Slowly(OneJob):
        async def known(self, jobs: Collection[JobId]) -> frozenset[JobId]:
            nonlocal now
            now += 100
            return await super().known(jobs)

    monkeypatch.setattr(
        "jobworker.sandbox.service.job_ends.time", SimpleNamespace(monotonic=lambda: now)
    )
    Spool.create(tmp_path / "1").close()
    record = JobRecord(
        id=JobId(1),
        spec=JobSpec(command=("true",)),
        owner="alice",
        state=State.INITIALIZING,
        created_at=NOW,
    )
    _send, exits = trio.open_memory_channel[JobExit](1)
    started = Started(pid=1, stdout=-1, stderr=-1, since=now - 10)
    taken = await take_over(
        NoJobs({JobId(1): (started, exits)}),  # type: ignore[arg-type]
        Slowly((record,)),  # type: ignore[arg-type]
        tmp_path,
        NOW,
    )
    (running,) = taken.running
    running.spool.close()
    assert running.record.started_at == NOW - timedelta(seconds=10)


async def test_output_that_cannot_be_read_keeps_no_service_from_its_start(
    ordinary_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("1", "2"):
        Spool.create(ordinary_directory / name).close()
        (ordinary_directory / name).chmod(0)
    history = OneJob((), removed=frozenset({JobId(1)}))
    taken = await take_over(
        NoJobs({}),  # type: ignore[arg-type]
        history,  # type: ignore[arg-type]
        ordinary_directory,
        NOW,
    )
    assert (taken.ids, history.never) == (frozenset(), {2})
    assert "job 1 was removed, but its output in" in caplog.text
    assert f"{ordinary_directory}/2 cannot be read (Permission denied)" in caplog.text


@define(eq=False)
class Disk:
    """Tells what it is asked to take, and refuses the output of some jobs."""

    done: list[str]
    refuses: frozenset[str] = frozenset()

    def fdatasync(self, file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        self.done.append(f"{path.parent.name} is asked for")
        if path.parent.name in self.refuses:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def of_job(job: int, **changes: object) -> JobRecord:
    record = JobRecord(
        id=JobId(job),
        spec=JobSpec(command=("true",)),
        owner="alice",
        state=State.RUNNING,
        created_at=NOW,
        started_at=NOW,
    )
    return evolve(record, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("told_by_a_note", [False, True])
async def test_end_that_is_told_has_its_output_on_the_disk_or_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by_a_note: bool, refuses: bool
) -> None:
    """That of a lost job, and one that the earlier service could not record."""
    done = list[str]()
    disk = Disk(done, frozenset("1") if refuses else frozenset())
    monkeypatch.setattr(os, "fdatasync", disk.fdatasync)
    spool = Spool.create(tmp_path / "1")
    append(spool, Stream.STDOUT, b"text")
    make_note(tmp_path, of_job(1))
    if told_by_a_note:
        await spool.seal()
        write_note(tmp_path, of_job(1, state=State.COMPLETED, exit_code=0, ended_at=NOW))
    spool.close()
    history = OneJob((of_job(1),), done=done)
    taken = await take_over(
        NoJobs({}),  # type: ignore[arg-type]
        history,  # type: ignore[arg-type]
        tmp_path,
        NOW,
    )
    (ended,) = taken.ended
    ended.spool.close()
    assert done == ["1 is asked for"] * 2 + ["1 is recorded"], "stdout, and the index"
    assert history.put_records == [ended.record]
    assert ended.record.state is (State.COMPLETED if told_by_a_note else State.FAILED)
    assert ("its output may not be on the disk: Input" in ended.record.detail) is refuses


async def test_disk_is_asked_again_where_a_service_was_killed_between_an_end_and_its_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The output of job 1 is there, 2's is refused, 3's is removed, 4's is no output.

    The history knows no end of 5's, which its note tells.
    """
    before, done = open_fds(), list[str]()
    disk = Disk(done, frozenset("2"))
    monkeypatch.setattr(os, "fdatasync", disk.fdatasync)
    ended = {"state": State.COMPLETED, "exit_code": 0, "ended_at": NOW}
    for job in (1, 2, 5):
        spool = Spool.create(tmp_path / str(job))
        append(spool, Stream.STDOUT, b"text")
        await spool.seal()
        spool.close()
    (tmp_path / "4").write_text("something else")
    make_note(tmp_path, of_job(5))
    write_note(tmp_path, of_job(5, **ended))
    history = OneJob((), ended=tuple(of_job(job, **ended) for job in range(1, 5)), done=done)
    taken = await take_over(
        EndedJobs.of(1, 2, 3, 4, 5, done=done),  # type: ignore[arg-type]
        history,  # type: ignore[arg-type]
        tmp_path,
        NOW,
    )
    for each in taken.ended:
        each.spool.close()
    assert [each.record.id for each in taken.ended] == [2, 4]
    put_last = sorted(history.put_records[1:], key=lambda record: record.id)
    assert put_last == [each.record for each in taken.ended]
    two, four = (each.record.detail for each in taken.ended)
    assert two == "its output may not be on the disk: Input/output error"
    assert four.startswith("its output may not be on the disk: cannot open the job's output")
    assert done[0] == "5 is recorded", "adopted"
    assert "adopted: 0 run, 1 have ended (5)" in caplog.text
    assert sorted(done[1:7]) == [f"{job} is asked for" for job in (1, 1, 2, 2, 5, 5)]
    assert sorted(done[7:9]) == ["2 is recorded", "4 is recorded"]
    assert done[9:] == [f"{job} is forgotten" for job in (1, 3, 5)], "2 and 4 with their ends"
    assert open_fds() == before
