"""The settlement of ended jobs: history and launcher may refuse for a while."""

from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import Factory, define

from jobworker.errors import (
    InternalError,
    JobworkerError,
    LauncherGone,
    LauncherSilent,
    NotFound,
    SandboxError,
)
from jobworker.jobs.inheritance import EndedJob, Takeover
from jobworker.jobs.live_record import RECORD_AGAIN_SECONDS, LiveRecord
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.settlement import Settlement
from jobworker.model.job import JobId, JobRecord
from jobworker.model.lifecycle import State

from ..strategies import record
from .supervised import FakeLink, spec, supervising
from .test_live_record import NOON, History, history, live

__all__ = ["history", "live"]


@define(eq=False)
class Launcher:
    """Forgets jobs, or refuses."""

    error: JobworkerError | None = None
    forgotten: list[JobId] = Factory(list)

    async def remove(self, job: JobId) -> None:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        self.forgotten.append(job)


@pytest.fixture
def launcher() -> Launcher:
    return Launcher()


@pytest.fixture
def settlement(live: LiveRecord, launcher: Launcher) -> Settlement:
    live.record = record(1, State.COMPLETED, started_at=NOON, ended_at=NOON)
    return Settlement(live_record=live, launcher=launcher)  # type: ignore[arg-type]


async def test_end_is_written_until_the_disk_takes_it_and_only_then_forgotten(
    autojump_clock: trio.testing.MockClock,
    settlement: Settlement,
    history: History,
    launcher: Launcher,
) -> None:
    history.refuses = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(settlement.finish)
        await trio.sleep(RECORD_AGAIN_SECONDS * 3.5)
        assert launcher.forgotten == []
        history.refuses = False
    assert (len(history.stored), launcher.forgotten) == (1, [JobId(1)])
    assert not settlement.is_gone, "the history has it"


async def test_launcher_is_asked_until_it_forgets(
    autojump_clock: trio.testing.MockClock, settlement: Settlement, launcher: Launcher
) -> None:
    launcher.error = SandboxError("no descriptor is left")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(settlement.finish)
        await trio.sleep(RECORD_AGAIN_SECONDS * 3.5)
        assert launcher.forgotten == []
        launcher.error = None
    assert launcher.forgotten == [JobId(1)]


@pytest.mark.parametrize(
    ("error", "is_gone"),
    [(LauncherGone("gone"), True), (NotFound("no such job"), True), (LauncherSilent("?"), False)],
)
async def test_launcher_that_has_ended_or_knows_no_such_job_has_forgotten_it(
    settlement: Settlement, launcher: Launcher, error: JobworkerError, is_gone: bool
) -> None:
    launcher.error = error
    await settlement.remove_record()
    await settlement.forget()
    assert settlement.is_gone is is_gone


async def test_job_that_never_started_is_none_of_the_launcher(
    settlement: Settlement, live: LiveRecord, launcher: Launcher
) -> None:
    live.record = record(1, State.FAILED)
    await settlement.forget()
    assert launcher.forgotten == []
    assert await settlement.remove_record(), "nobody has it any more"


async def test_removed_record_is_not_written_by_a_settlement_under_way(
    autojump_clock: trio.testing.MockClock,
    settlement: Settlement,
    history: History,
    launcher: Launcher,
) -> None:
    history.refuses = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(settlement.finish)
        await trio.sleep(RECORD_AGAIN_SECONDS * 1.5)
        history.refuses = False
        assert not await settlement.remove_record(), "the launcher has it still"
    assert (history.stored, history.removed) == ([], [JobId(1)])
    assert launcher.forgotten == [JobId(1)]
    assert settlement.is_gone


async def test_refusal_to_remove_is_told(
    settlement: Settlement, history: History, tmp_path: Path
) -> None:
    history.refuses = True
    with pytest.raises(InternalError):
        await settlement.remove_record()
    assert not settlement.is_gone


async def test_removal_for_which_the_launcher_takes_its_time_delays_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a job has left may wait for a disk that hangs; other jobs want room meanwhile."""
    asked, may = trio.Event(), trio.Event()

    async def remove(*_: object) -> None:
        asked.set()
        with trio.CancelScope(shield=True):
            await may.wait()

    monkeypatch.setattr(FakeLink, "remove", remove)
    end = JobRecord(
        id=JobId(1),
        spec=spec("taken over"),
        owner="alice",
        created_at=datetime.now(UTC),
        started_at=datetime.now(UTC),
        state=State.COMPLETED,
    )
    taken = Takeover(ended=[EndedJob(end, Spool.create(tmp_path / "1"))])
    async with supervising(tmp_path, max_running=1, inheritance=taken) as (supervisor, _, history):
        with trio.fail_after(20):
            await asked.wait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(supervisor.remove, JobId(1), force=False))
                try:
                    while history.records:  # noqa: ASYNC110
                        await trio.sleep(0.001)
                    await supervisor.prune(None, None)
                finally:
                    may.set()


async def test_job_is_told_as_removed_once_a_launcher_that_refused_has_forgotten_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next service finds it there, takes it for one that was lost, and makes a record."""
    monkeypatch.setattr("jobworker.jobs.live_record.RECORD_AGAIN_SECONDS", 0.01)
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        with trio.fail_after(20):
            await supervisor.submit(spec("first"), "alice")
            link.refusals = 3
            link.finish(JobId(1))
            await supervisor.wait(JobId(1))
            await supervisor.remove(JobId(1), force=False)
    assert (link.removed, history.records, link.refusals) == ([1], {}, 0)


async def test_removal_that_the_launcher_did_not_hear_of_before_the_end_is_not_told(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The next service finds the job there, and takes it for one that was lost."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        link.refusals, link.forgets_nothing = 10**9, True
        execution = await supervisor.submit(spec("first"), "alice")
        link.finish(JobId(1))
        await supervisor.wait(JobId(1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(supervisor.remove, JobId(1), force=False))
            while history.records:  # noqa: ASYNC110
                await trio.sleep(0.001)
            await supervisor.leave()
            await trio.sleep(10)  # more than the service gives those who wait for an answer
            assert not execution.forgotten.is_set()  # for which the removal waits
            nursery.cancel_scope.cancel()
