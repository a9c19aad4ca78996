"""What a service that starts removes: jobs that were removed without output, or refused."""

import os
from collections.abc import Collection
from pathlib import Path

import pytest
import trio
from attrs import Factory, define

from jobworker.errors import OutputError
from jobworker.jobs.history.job_note import make_note, note_refusal
from jobworker.jobs.leftovers import refused_of, remove_leftovers
from jobworker.jobs.output.ended import remove_output
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import JobId
from jobworker.model.lifecycle import State
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.service.job_reports import JobExit

from ..strategies import record


@define(eq=False)
class Launcher:
    """Has some jobs of an earlier service, until it is told to forget them."""

    inherited: dict[JobId, tuple[Started, Exits]] = Factory(dict)
    forgotten: list[JobId] = Factory(list)

    def keep(self, job: int) -> None:
        (out, out_write), (err, err_write) = os.pipe(), os.pipe()
        os.close(out_write)
        os.close(err_write)
        _send, exits = trio.open_memory_channel[JobExit](1)
        self.inherited[JobId(job)] = Started(pid=1, stdout=out, stderr=err), exits

    async def begin_to_remove(self, job: JobId) -> None:
        await trio.lowlevel.checkpoint()
        self.forgotten.append(job)


@define(eq=False)
class History:
    """Knows which jobs were removed while their output was missing."""

    removed_before: frozenset[JobId] = frozenset()
    asked_for: list[frozenset[JobId]] = Factory(list)
    removed: list[JobId] = Factory(list)

    async def removed_without_output(self, jobs: Collection[JobId]) -> frozenset[JobId]:
        await trio.lowlevel.checkpoint()
        self.asked_for.append(frozenset(jobs))
        return self.removed_before & frozenset(jobs)

    async def remove(self, job: JobId) -> None:
        await trio.lowlevel.checkpoint()
        self.removed.append(job)


@define(eq=False)
class Left:
    """What an earlier service has left."""

    spools: Path
    launcher: Launcher = Factory(Launcher)
    history: History = Factory(History)

    def output(self, job: int, *, refused: bool = False) -> Path:
        directory = self.spools / str(job)
        Spool.create(directory).close()
        make_note(self.spools, record(job, State.RUNNING))
        if refused:
            note_refusal(self.spools, JobId(job))
        return directory

    async def remove(self, unknown: set[int], unfinished: set[int]) -> frozenset[JobId]:
        return await remove_leftovers(
            self.launcher,  # type: ignore[arg-type]
            self.history,  # type: ignore[arg-type]
            self.spools,
            unknown=set(map(JobId, unknown)),
            unfinished=set(map(JobId, unfinished)),
        )


@pytest.fixture
def left(tmp_path: Path) -> Left:
    return Left(tmp_path)


def names_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


async def test_refused_job_is_removed_wherever_it_is(left: Left) -> None:
    left.output(1, refused=True)
    left.output(2, refused=True)
    left.output(3)
    left.launcher.keep(2)
    assert await left.remove(unknown={1}, unfinished={2, 3}) == {1, 2}
    assert left.launcher.forgotten == [2]
    assert left.history.removed == [2], "only that one may have a record"
    assert names_in(left.spools) == ["3"]


async def test_job_that_was_removed_without_its_output_loses_it_once_that_is_back(
    left: Left, caplog: pytest.LogCaptureFixture
) -> None:
    for job in (4, 5, 6):
        left.output(job)
    left.output(7, refused=True)
    left.launcher.keep(4)
    left.history.removed_before = frozenset({JobId(4), JobId(6), JobId(7)})
    assert await left.remove(unknown={4, 5, 7}, unfinished={6}) == {4, 7}
    assert left.history.asked_for == [{4, 5}], "what is refused needs no question"
    assert (left.launcher.forgotten, left.history.removed) == ([4], [])
    assert names_in(left.spools) == ["5", "6"]
    assert "job 4 was removed while its output was missing: its output is removed now" in (
        caplog.text
    )
    assert "job 7 was refused and stood there still" in caplog.text


async def test_mark_of_a_removal_that_a_killed_service_has_left_goes_too(left: Left) -> None:
    left.output(1, refused=True).rename(left.spools / "1.removed")
    for name in ("stdout", "stderr", "index"):
        (left.spools / "1.removed" / name).unlink()
    assert await left.remove(unknown={1}, unfinished=set()) == {1}
    assert names_in(left.spools) == []


async def test_output_that_cannot_be_removed_is_told_and_keeps_no_other(
    left: Left, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in (1, 2):
        left.output(job, refused=True)

    def remove(directory: Path, *, force: bool, ended: bool) -> int:
        if directory.name == "1":
            raise OutputError("cannot remove the job's output: Input/output error")
        return remove_output(directory, force=force, ended=ended)

    monkeypatch.setattr("jobworker.jobs.leftovers.remove_output", remove)
    assert await left.remove(unknown={1, 2}, unfinished=set()) == {1, 2}
    assert names_in(left.spools) == ["1"]
    assert f"job 1 was refused, but its output in {left.spools} stays" in caplog.text
    assert "job 1 was refused and stood" not in caplog.text


def test_only_notes_that_tell_of_a_refusal_do(left: Left) -> None:
    left.output(1, refused=True)
    left.output(2)
    assert refused_of(left.spools, [JobId(1), JobId(2), JobId(3)]) == {1}
    assert refused_of(left.spools, [JobId(2)]) == frozenset()
