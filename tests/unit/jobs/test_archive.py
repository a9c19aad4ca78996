"""The archive: what it tells of output that goes, and what the limit on all output counts."""

import errno
import os
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from attrs import frozen

from jobworker.errors import NotFound, OutOfDescriptors, OutputError, TooManyFollows
from jobworker.jobs.archive import MISSING, Archive
from jobworker.jobs.execution import Execution
from jobworker.jobs.history.history import History
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.output.index import Place, ReadFilter
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.retention import KeptOutput
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.model.job import JobId, JobRecord, Stream

from ..strategies import record
from .descriptors import descriptors_left
from .output.test_spool import append

NOTHING = RetentionPolicy(max_jobs=0)


@frozen
class Ground:
    """An archive over a history and a directory that are there."""

    spools: Path
    history: History
    budget: OutputBudget
    archive: Archive

    async def end_job(
        self,
        *,
        lost_to: Path | None = None,
        at_end: AbstractContextManager[None] = nullcontext(),  # noqa: B008 - stateless
        recorded: bool = True,
        owner: str = "alice",
        followed_by: ExitStack | None = None,
        forgotten: bool = True,
    ) -> JobId:
        """Have a job live, write and end; meanwhile somebody may have moved its output away.

        Or somebody has come to follow it, who takes nothing.
        """
        job = self.history.take_id()
        spool = Spool.create(self.spools / str(job))
        append(spool, Stream.STDOUT, b"x" * 1000)
        self.archive.count_live(spool)
        await spool.seal()
        if followed_by is not None:
            followed_by.enter_context(spool.follow())
        spool.close()
        if lost_to is not None:
            (self.spools / str(job)).rename(lost_to)

        async def remove_record() -> bool:
            await self.history.remove(job)
            return forgotten

        async def put(_record: JobRecord) -> None:
            await trio.lowlevel.checkpoint()

        execution = SimpleNamespace(
            record=record(job, owner=owner),
            spool=spool,
            archived=trio.Event(),
            settlement=SimpleNamespace(remove_record=remove_record),
            live_record=SimpleNamespace(note_removal_of_output=lambda _when: None, put=put),
        )
        with at_end:
            await self.archive.add(cast("Execution", execution))
        if recorded:
            await self.history.put(execution.record)
            self.archive.forget(cast("Execution", execution))
        return job

    async def stored(self, job: JobId) -> JobRecord:
        """What the history says of a job."""
        found = await self.history.summary(job)
        assert found is not None
        return found

    def check(self) -> int:
        """That just what stands on the disk counts: so many bytes."""
        there = sum(
            file.stat().st_size for each in self.spools.iterdir() for file in each.iterdir()
        )
        assert self.budget.used_bytes == self.archive.size_of(record(1).owner) == there
        return there


@asynccontextmanager
async def ground(directory: Path, max_open: int = 1024) -> AsyncIterator[Ground]:
    spools = directory / "spool"
    spools.mkdir(exist_ok=True)
    history = History.open(directory / "history.db", spools)
    try:
        budget = OutputBudget(spools)
        archive = Archive(
            spools=spools,
            history=history,
            policy=RetentionPolicy(),
            budget=budget,
            clock=lambda: datetime.now(UTC),
            max_open=max_open,
        )
        await archive.load()
        yield Ground(spools, history, budget, archive)
    finally:
        history.close()


async def test_output_that_goes_while_somebody_asks_is_told_as_removed(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        removed, pruned = await here.end_job(), await here.end_job()
        # Who asks has read the records, and gets no further for a moment.
        before = [await here.stored(job) for job in (removed, pruned)]
        await here.archive.remove(removed, force=False)
        assert [each.job for each in await here.archive.prune(NOTHING)] == [pruned]

        with pytest.raises(NotFound, match="no such job"):
            await here.archive.look_after(before[0])
        told = await here.archive.look_after(before[1])
        assert (told.output_removed_at is not None, told.detail) == (True, "")
        for each, words in zip(before, ("no such job", "it is not kept any more"), strict=True):
            with pytest.raises(NotFound, match=words):
                async with here.archive.reading(each):
                    pass
        assert here.archive._kept.missing == 0


async def test_output_of_a_job_that_a_full_disk_does_not_record_is_told_as_missing_or_removed(
    tmp_path: Path,
) -> None:
    async with ground(tmp_path) as here:
        job = await here.end_job(lost_to=tmp_path / "away", recorded=False)
        told = await here.archive.look_after(record(job))
        assert (told.id, MISSING in told.detail) == (job, True)
        (tmp_path / "away").rename(here.spools / str(job))
        await here.archive.prune()
        assert here.check() > 0
        await here.archive.remove(job, force=False)
        with pytest.raises(NotFound, match="no such job"):
            await here.archive.look_after(record(job))
        assert (here.check(), here.archive._kept.missing) == (0, 0)


async def test_note_of_a_removed_job_stays_until_the_launcher_has_forgotten_the_job(
    tmp_path: Path,
) -> None:
    """Else the next service finds a job there of which nothing tells whose it was."""
    async with ground(tmp_path) as here:
        job = await here.end_job(recorded=False, forgotten=False)
        for _ in range(2):  # two clients may ask for it
            await here.archive.remove(job, force=False)
        await here.archive.prune()
        assert [each.name for each in here.spools.iterdir()] == [f"{job}.removed"]
        await here.archive.clear(job)
        assert list(here.spools.iterdir()) == []


async def test_note_of_a_refused_job_stays_where_the_disk_refuses_amid_the_removal_of_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark stands by then, and the archive may look at it before the removal is tried again."""

    def refuse(_file: int, _others: tuple[str, ...]) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with ground(tmp_path) as here:
        job = await here.end_job(recorded=False)
        with monkeypatch.context() as patch:
            patch.setattr("jobworker.jobs.output.directory._unlink_below", refuse)
            with pytest.raises(OutputError):
                await here.archive.take_back(job)
        await here.archive.prune()
        assert [each.name for each in here.spools.iterdir()] == [f"{job}.removed"]
        await here.archive.take_back(job)
        await here.archive.clear(job)
        assert list(here.spools.iterdir()) == []


async def test_output_that_another_hand_took_is_told_as_missing_until_it_is_back(
    tmp_path: Path,
) -> None:
    async with ground(tmp_path) as here:
        job = await here.end_job()
        size = here.check()
        (here.spools / str(job)).rename(tmp_path / "away")
        assert MISSING in (await here.archive.look_after(await here.stored(job))).detail
        with pytest.raises(NotFound, match="no request and no rule has removed it"):
            async with here.archive.reading(await here.stored(job)):
                pass
        assert (here.archive._kept.missing, here.check()) == (1, 0)
        (tmp_path / "away").rename(here.spools / str(job))
        await here.archive.prune()
        assert (here.archive._kept.missing, here.check()) == (0, size)


async def test_what_worker_prune_removes_meanwhile_counts_no_longer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ground(tmp_path) as here:
        jobs = [await here.end_job() for _ in range(3)]
        here.check()
        other = KeptOutput(here.spools)
        other.load()

        def only(job: JobId) -> bool:  # asked after the look, and before the removal
            other.remove(job) if job == jobs[1] else None
            return True

        gone = await here.archive.prune(NOTHING, only=only)
        assert [each.job for each in gone] == [jobs[0], jobs[2]]
        assert here.check() == 0
        await here.archive.prune()
        assert (here.check(), here.archive._kept.missing) == (0, 0)
        assert (await here.stored(jobs[1])).output_removed_at is not None
        assert "missing" not in caplog.text


async def test_what_a_live_job_wrote_counts_once_and_not_where_it_is_lost(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        await here.end_job()
        size = here.check()
        lost = await here.end_job(lost_to=tmp_path / "away")
        assert (here.check(), here.archive._kept.missing) == (size, 1)
        (tmp_path / "away").rename(here.spools / str(lost))
        await here.archive.prune()
        assert (here.check(), here.archive._kept.missing) == (2 * size, 0)
        await here.archive.remove(lost, force=False)
        assert here.check() == size
    async with ground(tmp_path) as here:
        assert here.check() == size


async def test_end_of_a_job_takes_nothing_off_what_others_have_written(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        here.budget.count(1000)  # another lives
        for _ in range(3):
            await here.end_job()
        assert here.budget.live_bytes == 1000


async def test_want_of_descriptors_leaves_nothing_uncounted(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        size = await here.end_job() and here.check()
        late = await here.end_job(at_end=descriptors_left(1))
        assert here.budget.live_bytes > 0, "it is not taken up yet"
        await here.archive.prune()
        assert (here.budget.live_bytes, here.check()) == (0, 2 * size)

        # One is away and comes back, and another goes.
        (here.spools / "1").rename(tmp_path / "away")
        await here.archive.prune()
        (tmp_path / "away").rename(here.spools / "1")
        KeptOutput(here.spools).remove(late)
        with descriptors_left(1), pytest.raises(OutOfDescriptors):  # enough to list a directory
            await here.archive.prune()
        await here.archive.prune()
        assert (here.check(), here.archive._kept.missing) == (size, 0)


async def test_job_removed_before_it_was_taken_up_counts_no_longer(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        late = await here.end_job(at_end=descriptors_left(1))
        await here.archive.remove(late, force=False)
        await here.archive.prune()
        assert (here.check(), here.archive._kept.missing) == (0, 0)


async def test_room_that_another_job_has_made_is_room(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        await here.end_job()
        here.budget.max_bytes = here.check()
        async with trio.open_nursery() as nursery:
            made = list[bool]()

            async def make() -> None:
                made.append(await here.archive.make_room())

            nursery.start_soon(make)
            nursery.start_soon(make)
        assert made == [True, True]


async def test_room_that_others_have_taken_at_once_is_looked_for_again(tmp_path: Path) -> None:
    async with ground(tmp_path) as here:
        await here.end_job()
        here.budget.max_bytes = 1000
        here.budget.count(1000)  # what others have written
        assert [await here.archive.make_room() for _ in range(2)] == [True, False]


async def test_room_is_made_beside_output_that_cannot_be_read(ordinary_directory: Path) -> None:
    async with ground(ordinary_directory) as here:
        first, second = await here.end_job(), await here.end_job()
        here.budget.max_bytes = here.check()
        (here.spools / str(first)).chmod(0)
        assert await here.archive.make_room()
        assert here.budget.used_bytes == here.archive.size_of(record(second).owner) > 0
        (here.spools / str(first)).chmod(0o700)
        await here.archive.prune()
        here.check()


def open_outputs(here: Ground) -> list[int]:
    """The jobs whose output is open, as the kernel says, each as often as it is."""
    files = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
    return sorted(
        int(file.parent.name)
        for file in files
        if file.parent.parent == here.spools and file.name == "index"
    )


async def test_who_followed_jobs_to_their_ends_holds_no_more_files_than_there_may_be(
    tmp_path: Path,
) -> None:
    async with ground(tmp_path, max_open=2) as here:
        with ExitStack() as followers:
            for _ in range(2):
                await here.end_job(followed_by=followers)
            first = next(iter(here.archive._outputs._owners))
            assert isinstance(first, Spool)
            await first.read(Place(), ReadFilter())
            await here.end_job(followed_by=followers)
            assert open_outputs(here) == [1, 3]
            await here.end_job(followed_by=followers)
            assert open_outputs(here) == [3, 4], "those who took nothing for longest come again"
            with pytest.raises(TooManyFollows, match="output of 2 ended jobs is being read"):
                async with here.archive.reading(await here.stored(JobId(1))):
                    pass
        assert (open_outputs(here), here.archive._outputs._owners) == ([], {})
        async with here.archive.reading(await here.stored(JobId(1))):
            assert open_outputs(here) == [1]


async def test_owner_who_reads_little_gets_a_place_of_one_who_reads_much(tmp_path: Path) -> None:
    async with ground(tmp_path, max_open=5) as here:
        mine = [await here.end_job(owner="bob") for _ in range(3)]
        with ExitStack() as followers:
            for _ in range(5):
                await here.end_job(followed_by=followers)
            for job, open_now in zip(mine, ([1, 5, 6, 7, 8], [1, 2, 6, 7, 8]), strict=False):
                async with here.archive.reading(await here.stored(job)) as spool:
                    followers.enter_context(spool.follow())
                assert open_outputs(here) == open_now
            with pytest.raises(TooManyFollows):  # she would have less than he then
                async with here.archive.reading(await here.stored(mine[2])):
                    pass
            for each, owner in here.archive._outputs._owners.items():
                if owner == "alice" and isinstance(each, Spool):
                    await each.read(Place(), ReadFilter())
            await here.end_job(followed_by=followers)
            assert open_outputs(here) == [1, 2, 7, 8, 9], "hers goes, though his is read less"
        assert (open_outputs(here), here.archive._outputs._owners, here.archive._outputs._open) == (
            [],
            {},
            {},
        )
