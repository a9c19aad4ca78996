"""An archive over a history and a directory that are there."""

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import trio
from attrs import frozen

from jobworker.jobs.archive import Archive
from jobworker.jobs.execution import Execution
from jobworker.jobs.history.history import History
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.model.job import JobId, JobRecord, Stream

from ..strategies import record
from .output.written_logs import append

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
