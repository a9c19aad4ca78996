"""What a service that starts makes of earlier jobs, over a launcher and a history that it plays."""

import shutil
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from attrs import define, evolve, field

from jobworker.jobs.job_note import make_note, write_note
from jobworker.jobs.spool import Spool
from jobworker.jobs.takeover import take_over
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.lifecycle import Reason, State
from jobworker.sandbox.launch import Exit
from jobworker.sandbox.link import Exits, Started

NOW = datetime(2026, 11, 24, tzinfo=UTC)


@define(eq=False)
class NoJobs:
    """A launcher that was started anew."""

    inherited: dict[JobId, tuple[Started, Exits]]
    unstarted: frozenset[JobId] = frozenset()


@define(eq=False)
class OneJob:
    """A history with one job that had not ended."""

    unfinished: tuple[JobRecord, ...]
    removed: frozenset[JobId] = frozenset()
    never: set[JobId] = field(factory=set)
    put_records: list[JobRecord] = field(factory=list)

    async def put(self, record: JobRecord) -> None:
        self.put_records.append(record)

    async def known(self, _: Collection[JobId]) -> frozenset[JobId]:
        return frozenset(record.id for record in self.unfinished)

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


async def test_program_began_when_the_launcher_said_however_long_it_takes_to_go_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0

    class Slowly(OneJob):
        async def known(self, jobs: Collection[JobId]) -> frozenset[JobId]:
            nonlocal now
            now += 100
            return await super().known(jobs)

    monkeypatch.setattr("jobworker.sandbox.link.time", SimpleNamespace(monotonic=lambda: now))
    Spool.create(tmp_path / "1").close()
    record = JobRecord(
        id=JobId(1),
        spec=JobSpec(command=("true",)),
        owner="alice",
        state=State.INITIALIZING,
        created_at=NOW,
    )
    _send, exits = trio.open_memory_channel[Exit](1)
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
    assert "job 1 was removed, and what is in" in caplog.text
    assert f"{ordinary_directory}/2 cannot be read (Permission denied)" in caplog.text
