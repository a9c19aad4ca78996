"""The open outputs of ended jobs: so many at most, shared between owners."""

from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing

from jobworker.errors import NotFound, TooManyFollows
from jobworker.jobs.open_outputs import OpenOutputs
from jobworker.jobs.output.index import Place, ReadFilter
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import JobId

from ..strategies import record
from .archived import Ground, ground


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


def made(job: int, directory: Path) -> Spool:
    """A sealed spool of an ended job."""
    spool = Spool.create(directory / f"{job}-{len(list(directory.iterdir()))}")
    spool.sealed = True
    return spool


async def test_readers_of_one_job_share_its_open_output(tmp_path: Path) -> None:
    outputs, opened = OpenOutputs(1), list[Spool]()

    async def open_spool() -> Spool:
        opened.append(made(1, tmp_path))
        return opened[-1]

    async with outputs.reading(record(1), open_spool) as first:
        async with outputs.reading(record(1), open_spool) as second:
            assert first is second
        assert first.has_files, "the first reads still"
    assert (len(opened), first.has_files, outputs._owners) == (1, False, {})
    async with outputs.reading(record(1), open_spool) as third:
        assert third is not first


async def test_output_stays_open_for_a_follower_after_the_block(tmp_path: Path) -> None:
    outputs = OpenOutputs(1)

    async def open_spool() -> Spool:
        return made(1, tmp_path)

    async with outputs.reading(record(1), open_spool) as spool:
        follower = spool.follow()
    assert spool.has_files
    async with outputs.reading(record(1), open_spool) as again:
        assert again is spool
    follower.close()
    assert not spool.has_files


async def test_spool_that_another_task_has_opened_meanwhile_is_taken(tmp_path: Path) -> None:
    outputs, slow = OpenOutputs(2), trio.Event()
    opened, read = list[Spool](), list[Spool]()

    async def open_slowly() -> Spool:
        opened.append(made(1, tmp_path))
        mine = opened[-1]
        await slow.wait()
        return mine

    async def read_it() -> None:
        async with outputs.reading(record(1), open_slowly) as spool:
            read.append(spool)
            await trio.testing.wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_it)
        nursery.start_soon(read_it)
        await trio.testing.wait_all_tasks_blocked()
        assert len(opened) == 2
        with pytest.raises(TooManyFollows):  # what is being opened counts
            async with outputs.reading(record(2), open_slowly):
                pass
        slow.set()
    assert read[0] is read[1]
    assert not any(each.has_files for each in opened), "the other one too is closed"
    assert outputs._owners == {}


async def test_output_that_was_removed_is_opened_again_to_say_so(tmp_path: Path) -> None:
    outputs = OpenOutputs(2)

    async def open_spool() -> Spool:
        return made(1, tmp_path)

    async def refuse() -> Spool:
        await trio.lowlevel.checkpoint()
        raise NotFound("it is not kept any more")

    async with outputs.reading(record(1), open_spool):
        removed = record(1, output_removed_at=datetime.now(UTC))
        with pytest.raises(NotFound):
            async with outputs.reading(removed, refuse):
                pass
        assert len(outputs._owners) == 1, "the place of the failed attempt is free"


async def test_ended_job_without_files_of_followers_counts_for_nothing(tmp_path: Path) -> None:
    outputs, spool = OpenOutputs(1), made(1, tmp_path)
    spool.close()
    outputs.count_followed(spool, "alice")
    assert outputs._owners == {}


async def test_owner_with_one_more_than_another_loses_none(tmp_path: Path) -> None:
    """Else the two would take each other's last place in turn."""
    outputs, spools = OpenOutputs(3), dict[int, Spool]()

    async def follow(job: int, owner: str, stack: ExitStack) -> None:
        async def open_spool() -> Spool:
            return made(job, tmp_path)

        async with outputs.reading(record(job, owner=owner), open_spool) as spool:
            stack.enter_context(spool.follow())
            spools[job] = spool

    def open_now() -> list[int]:
        return [job for job, spool in spools.items() if spool.has_files]

    with ExitStack() as stack:
        for job, owner in ((1, "alice"), (2, "alice"), (3, "bob")):
            await follow(job, owner, stack)
        with pytest.raises(TooManyFollows, match="output of job 4"):
            await follow(4, "bob", stack)
        assert open_now() == [1, 2, 3]
        await follow(5, "carol", stack)
        assert open_now() == [2, 3, 5], "hers that was read least recently"
    assert (open_now(), outputs._owners) == ([], {})


async def test_output_that_was_closed_while_a_thread_reads_it_is_lost_to_its_owner_once(
    tmp_path: Path,
) -> None:
    outputs = OpenOutputs(2)

    async def open_spool() -> Spool:
        return made(1, tmp_path)

    with ExitStack() as stack:
        for job in (1, 2):
            async with outputs.reading(record(job), open_spool) as spool:
                stack.enter_context(spool.follow())
                stack.enter_context(spool.in_use())
        for _ in range(2):
            with pytest.raises(TooManyFollows):
                async with outputs.reading(record(3, owner="bob"), open_spool):
                    pass
        shut = [each.shut for each in outputs._owners if isinstance(each, Spool)]
        assert shut == [True, False], "alice would have fewer than two then"


async def test_many_followed_jobs_that_end_at_once_lose_the_oldest(tmp_path: Path) -> None:
    """One that is shut out and still being read is passed over."""
    outputs = OpenOutputs(1)
    spools = [made(job, tmp_path) for job in range(3)]
    with ExitStack() as stack:
        for each in spools:
            stack.enter_context(each.follow())
            each.close()
        stack.enter_context(spools[0].in_use())
        for each in spools:
            outputs.count_followed(each, "alice")
        assert [each.shut for each in spools] == [True, True, True]
        assert [each.has_files for each in spools] == [True, False, False]
    assert outputs._owners == {}


async def test_owner_with_one_output_does_not_lose_it_for_what_another_is_opening(
    tmp_path: Path,
) -> None:
    outputs, never = OpenOutputs(4), trio.Event()

    async def open_spool() -> Spool:
        return made(1, tmp_path)

    async def hang() -> Spool:
        await never.wait()
        raise AssertionError

    async def read(job: int) -> None:
        async with outputs.reading(record(job, owner="alice"), hang):
            pass

    async with outputs.reading(record(1, owner="bob"), open_spool) as his:
        follower = his.follow()
    async with trio.open_nursery() as nursery:
        for job in (2, 3, 4):
            nursery.start_soon(read, job)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(TooManyFollows):
            async with outputs.reading(record(5, owner="carol"), open_spool):
                pass
        assert not his.shut
        nursery.cancel_scope.cancel()
    follower.close()
