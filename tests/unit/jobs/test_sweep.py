"""Sweeps: what goes, in which portions, and who goes before the next portion."""

import threading
from collections.abc import Collection, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing
from attrs import Factory, define

from jobworker.errors import InternalError
from jobworker.jobs import retention
from jobworker.jobs.history.history import History
from jobworker.jobs.output.ended import remove_output
from jobworker.jobs.retention import KeptOutput
from jobworker.jobs.retention_policy import EndedOutput, RetentionPolicy
from jobworker.jobs.sweep import PORTION_BYTES, Sweep, prune
from jobworker.model.job import JobId
from jobworker.sandbox.channel import close_all

from .archived import NOTHING, Ground, ground

SECOND = 1_000_000_000
FIVE = [EndedOutput(JobId(n), n * SECOND, 100) for n in range(1, 6)]


@define(eq=False)
class Kept:
    """Output that is there in memory only. Jobs with even ids are bob's."""

    all: dict[JobId, EndedOutput]
    stays: Collection[int] = ()
    last: tuple[int, JobId] = Factory(lambda self: self._ends()[-1], takes_self=True)

    def _ends(self) -> list[tuple[int, JobId]]:
        return sorted((each.ended_ns, each.job) for each in self.all.values())

    def now_ns(self) -> int:
        return 10 * SECOND

    def owner_of(self, job: JobId) -> str:
        return "alice" if job % 2 else "bob"

    def _of(self, owner: str | None) -> list[EndedOutput]:
        return [each for each in self.all.values() if owner in (None, self.owner_of(each.job))]

    def number_of(self, owner: str | None) -> int:
        return len(self._of(owner))

    def size_of(self, owner: str | None) -> int:
        return sum(each.size for each in self._of(owner))

    def next_after(self, position: tuple[int, JobId]) -> EndedOutput | None:
        return next((self.all[end[1]] for end in self._ends() if end > position), None)

    def try_removal(self, job: JobId) -> bool:
        return job not in self.stays and self.all.pop(job, None) is not None


def kept(outputs: Sequence[EndedOutput] = FIVE, stays: Collection[int] = ()) -> KeptOutput:
    return cast("KeptOutput", Kept({each.job: each for each in outputs}, stays))


def ids(outputs: Collection[EndedOutput]) -> list[int]:
    return [each.job for each in outputs]


@pytest.mark.parametrize(
    ("policy", "gone"),
    [
        (RetentionPolicy(max_age_seconds=7), [2]),
        (RetentionPolicy(max_jobs=3), [2]),
        (RetentionPolicy(max_bytes=450), [2]),
        (RetentionPolicy(max_bytes=250), [2, 4, 5]),
    ],
)
def test_in_the_place_of_what_cannot_go_goes_the_next(
    policy: RetentionPolicy, gone: list[int]
) -> None:
    assert ids(prune(kept(stays={1, 3}), policy)) == gone


def test_owner_s_output_alone_counts_and_goes() -> None:
    sweep = Sweep(kept=kept(), policy=RetentionPolicy(max_jobs=1), owner="alice")
    sweep.portion()
    assert (sweep.is_over, ids(sweep.gone)) == (True, [1, 3])


@pytest.mark.parametrize("policy", [RetentionPolicy(max_jobs=2), RetentionPolicy(max_bytes=200)])
def test_sweep_removes_no_more_than_needed_when_other_output_goes_meanwhile(
    policy: RetentionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobworker.jobs.sweep.PORTION_JOBS", 1)
    there = kept()
    sweep = Sweep(kept=there, policy=policy)
    sweep.portion()
    for job in (4, 5):  # a client removes these
        there.try_removal(JobId(job))
    while not sweep.is_over:
        sweep.portion()
    assert (ids(sweep.gone), sorted(there.all)) == ([1], [2, 3])


def test_output_of_a_job_that_ends_during_a_sweep_stays_for_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise a sweep might not end as long as jobs do."""
    monkeypatch.setattr("jobworker.jobs.sweep.PORTION_JOBS", 1)
    there = kept()
    sweep, number = Sweep(kept=there, policy=NOTHING), 5
    while not sweep.is_over:
        sweep.portion()
        number += 1
        late = EndedOutput(JobId(number), number * SECOND, 100)
        cast("Kept", there).all[late.job] = late
    assert ids(sweep.gone) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("number", "size", "seconds", "portions"),
    [(2, 1, 3600.0, [2, 2, 1]), (9, PORTION_BYTES, 3600.0, [1] * 5), (9, 1, -1.0, [1] * 5)],
    ids=["number", "bytes", "time"],
)
def test_portion_is_bounded(
    monkeypatch: pytest.MonkeyPatch, number: int, size: int, seconds: float, portions: list[int]
) -> None:
    monkeypatch.setattr("jobworker.jobs.sweep.PORTION_JOBS", number)
    monkeypatch.setattr("jobworker.jobs.sweep.PORTION_SECONDS", seconds)
    there = kept([EndedOutput(JobId(n), n * SECOND, size) for n in range(1, 6)])
    sweep, removed = Sweep(kept=there, policy=NOTHING), list[int]()
    while not sweep.is_over:
        removed.append(len(sweep.portion()))
    assert [each for each in removed if each] == portions


@define(eq=False)
class HeldCall:
    """A function of a thread, whose first call waits until it may go on."""

    function: object
    calls: int = 0
    begun: threading.Event = Factory(threading.Event)
    may: threading.Event = Factory(threading.Event)

    def __call__(self, *arguments: object, **options: object) -> object:
        self.calls += 1
        self.begun.set()
        assert self.may.wait(20)
        return self.function(*arguments, **options)  # type: ignore[operator]

    async def wait_begun(self) -> None:
        assert await trio.to_thread.run_sync(self.begun.wait, 20)


@pytest.fixture
def removal(monkeypatch: pytest.MonkeyPatch) -> HeldCall:
    """The removals of output, of which the first one is held; a portion has one of them."""
    held = HeldCall(remove_output)
    monkeypatch.setattr(retention, "remove_output", held)
    monkeypatch.setattr("jobworker.jobs.sweep.PORTION_JOBS", 1)
    return held


async def test_jobs_that_end_and_are_removed_during_a_sweep_go_before_its_next_portion(
    tmp_path: Path, removal: HeldCall
) -> None:
    """Else their places stay taken, and no other job starts, until the sweep is over."""
    async with ground(tmp_path) as here:
        for _ in range(5):
            await here.end_job()
        removals_before = dict[str, int]()

        async def end() -> None:
            await here.end_job()
            removals_before["end"] = removal.calls

        async def remove() -> None:
            await here.archive.remove(JobId(5), force=False)
            removals_before["removal"] = removal.calls

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.archive.prune, NOTHING)
                await removal.wait_begun()
                nursery.start_soon(end)
                nursery.start_soon(remove)
                await trio.testing.wait_all_tasks_blocked(0.1)
                removal.may.set()
        finally:
            removal.may.set()
        assert removals_before["end"] <= 2
        assert removals_before["removal"] <= 3  # its own is one of them
        assert sorted(here.archive._kept.all) == [6]
        await here.archive.prune()
        here.check()


async def test_cancelled_sweep_ends_after_its_portion_and_leaves_all_consistent(
    tmp_path: Path, removal: HeldCall
) -> None:
    """The end of the service waits for one portion."""
    async with ground(tmp_path) as here:
        jobs = [await here.end_job() for _ in range(3)]
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.archive.prune, NOTHING)
                await removal.wait_begun()
                nursery.cancel_scope.cancel()
                removal.may.set()
        finally:
            removal.may.set()
        times = [(await here.stored(job)).output_removed_at for job in jobs]
        assert [when is not None for when in times] == [True, False, False]
        assert sorted(each.name for each in here.spools.iterdir()) == ["2", "3"]
        here.check()


@pytest.mark.parametrize("by", ["the service", "another process"])
async def test_removals_are_recorded_in_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """A transaction with all of them would hold up the records of all other jobs."""
    for module in ("sweep", "archive"):
        monkeypatch.setattr(f"jobworker.jobs.{module}.PORTION_JOBS", 2)
    async with ground(tmp_path) as here:
        await end_five(here)
        if by == "another process":
            other = KeptOutput(here.spools)
            other.load()
            prune(other, NOTHING)
        numbers, mark = list[int](), History.mark_output_removed

        async def count(history: History, jobs: Collection[JobId], when: datetime) -> None:
            numbers.append(len(jobs))
            await mark(history, jobs, when)

        monkeypatch.setattr(History, "mark_output_removed", count)
        await here.archive.prune(NOTHING)
        assert (sum(numbers), max(numbers)) == (5, 2)
        assert list(here.spools.iterdir()) == []


async def test_output_that_was_removed_while_no_service_ran_is_not_told_as_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ground(tmp_path) as here:
        job = await here.end_job()
    other = KeptOutput(here.spools)
    other.load()
    prune(other, NOTHING)
    async with ground(tmp_path) as here:
        await here.archive.prune()
        assert (await here.stored(job)).output_removed_at is not None
    assert "missing" not in caplog.text


@pytest.mark.parametrize("refusals", [1, 2])
async def test_removals_that_the_history_refuses_are_recorded_at_the_end_or_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    """All output goes all the same, and the history is not asked again for each portion."""
    monkeypatch.setattr("jobworker.jobs.sweep.PORTION_JOBS", 1)
    async with ground(tmp_path) as here:
        await end_five(here)
        asked, mark = list[int](), History.mark_output_removed

        async def refuse(history: History, jobs: Collection[JobId], when: datetime) -> None:
            asked.append(len(jobs))
            if len(asked) <= refusals:
                raise InternalError("cannot record that output was removed: the disk is full")
            await mark(history, jobs, when)

        monkeypatch.setattr(History, "mark_output_removed", refuse)
        assert len(await here.archive.prune(NOTHING)) == 5
        assert asked == [1, 5]
        assert len(list(here.spools.iterdir())) == (5 if refusals == 2 else 0)
        await here.archive.prune(NOTHING)
        assert list(here.spools.iterdir()) == []
        here.check()


async def test_end_of_a_job_does_not_wait_while_the_disk_frees_large_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldCall(close_all)
    monkeypatch.setattr("jobworker.jobs.archive.LARGE_BYTES", 1000)
    async with ground(tmp_path) as here:
        for act in (here.archive.prune, partial(here.archive.remove, JobId(2), force=False)):
            await here.end_job()
            held.may.clear()
            held.begun.clear()
            try:
                async with trio.open_nursery() as nursery:
                    with monkeypatch.context() as patch:
                        patch.setattr("jobworker.jobs.archive.close_all", held_for_large(held))
                        patch.setattr(here.archive, "_policy", NOTHING)
                        nursery.start_soon(act)
                        await held.wait_begun()
                        with trio.fail_after(20):
                            await here.end_job()
                        held.may.set()
            finally:
                held.may.set()


def held_for_large(held: HeldCall) -> object:
    """Closes files; the removed file with output only when that may be."""

    def close(files: Sequence[int]) -> None:
        if any(Path(f"/proc/self/fd/{file}").readlink().match("*/stdout*") for file in files):
            held(files)
        else:
            close_all(files)

    return close


async def end_five(here: Ground) -> None:
    for _ in range(5):
        await here.end_job()
