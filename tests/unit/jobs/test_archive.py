"""The archive: what it tells of output that goes, and what the limit on all output counts."""

import errno
import os
from pathlib import Path

import pytest
import trio

from jobworker.errors import NotFound, OutOfDescriptors, OutputError
from jobworker.jobs.archive import MISSING
from jobworker.jobs.retention import KeptOutput
from jobworker.model.job import JobId

from ..strategies import record
from .archived import NOTHING, ground
from .descriptors import descriptors_left


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
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ground(tmp_path) as here:
        jobs = [await here.end_job() for _ in range(3)]
        here.check()
        other = KeptOutput(here.spools)
        other.load()
        look = KeptOutput.look

        def look_first(kept: KeptOutput) -> list[JobId]:
            marked = look(kept)
            other.remove(jobs[1]) if kept is not other else None
            return marked

        monkeypatch.setattr(KeptOutput, "look", look_first)
        gone = await here.archive.prune(NOTHING)
        monkeypatch.undo()
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
