"""The open outputs of ended jobs: so many at most, shared between owners."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from jobworker.errors import TooManyFollows
from jobworker.jobs.output.index import Place, ReadFilter
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import JobId

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
