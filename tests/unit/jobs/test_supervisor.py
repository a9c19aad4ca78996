"""The supervisor: who runs when, over a launcher and a history that are not there."""

import math
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Self

import pytest
import trio
import trio.testing
from attrs import Factory, define, evolve

from jobworker.errors import (
    Busy,
    InternalError,
    LauncherSilent,
    NotFound,
    OutputError,
    SandboxError,
    ShuttingDown,
)
from jobworker.incidents import Incidents
from jobworker.jobs import secrets
from jobworker.jobs.archive import Archive
from jobworker.jobs.execution import Execution
from jobworker.jobs.history.search import Filter, Page
from jobworker.jobs.inheritance import EndedJob, RunningJob, Takeover, WaitingJob
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.mover import DRAIN_SECONDS
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.retention import KeptOutput
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.jobs.rules import Clock, Rules
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import JobId, JobRecord, JobSpec, Limits, OutputCut, Stream, Usage
from jobworker.model.lifecycle import Reason, State
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.service.job_reports import JobExit
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

from ..strategies import record
from .output.test_spool import append

RULES = Rules(
    defaults=Limits(cpu_percent=0, memory_bytes=0, io_bps=0, processes=0, output_bytes=0),
    timeout_seconds=0,
    stop_grace_seconds=5,
    at_max_output="discard-output",
    on_disk_full="discard-output",
)


@define(eq=False)
class FakeLink:
    """Starts nothing; a job runs until `finish`."""

    spawned: list[JobId] = Factory(list)
    removed: list[JobId] = Factory(list)
    silent: bool = False
    given_up: bool = False
    keeps_asks: bool = True
    stuck: bool = False
    """Whether no start is ever answered."""
    sends: bool = True
    """Whether starts reach the launcher."""
    refusals: int = 0
    """How many requests to remove a job are refused before one is taken."""
    forgets_nothing: bool = False
    """Whether a request to remove a job fails once this was given up."""
    let_go: trio.Event = Factory(trio.Event)
    _jobs: dict[JobId, tuple[trio.MemorySendChannel[JobExit], list[int]]] = Factory(dict)

    async def spawn(self, job: JobId, *_: object) -> tuple[Started, Exits]:
        await trio.lowlevel.checkpoint()
        if self.stuck:
            with trio.CancelScope(shield=True):
                await self.let_go.wait()
            data = {} if self.sends else {"sent": False}
            raise LauncherSilent("cannot tell what becomes of the request", data=data)
        send, receive = trio.open_memory_channel[JobExit](1)
        (out, out_write), (err, err_write) = (os.pipe2(os.O_NONBLOCK) for _ in range(2))
        self._jobs[job] = send, [out_write, err_write]
        self.spawned.append(job)
        return Started(pid=1, stdout=out, stderr=err), receive

    def write(self, job: JobId, data: bytes) -> None:
        """Have a job write to both of its streams."""
        for pipe in self._jobs[job][1]:
            os.write(pipe, data)

    def finish(
        self,
        job: JobId,
        *,
        keep_pipes: bool = False,
        unseen: tuple[str, ...] = (),
        signal: int | None = None,
    ) -> list[int]:
        """Have a job exit with 0, or end by a signal: the ends of its pipes that somebody keeps."""
        send, pipes = self._jobs.pop(job)
        while pipes and not keep_pipes:
            os.close(pipes.pop())
        code = 0 if signal is None else None
        send.send_nowait(JobExit(code=code, signal=signal, usage=Usage(), unseen=unseen))
        send.close()
        return pipes

    async def signal(self, *_: object) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def wait_unless_silent(self, event: trio.Event) -> None:
        if self.silent and not event.is_set():
            raise LauncherSilent("cannot serve the request: the launcher does not answer")
        await event.wait()

    def give_up(self) -> None:
        self.given_up = True
        self.let_go.set()

    async def give_up_start(self, _: JobId) -> None:
        await trio.lowlevel.checkpoint()

    async def kill(self, job: JobId, *_: object) -> None:
        await trio.lowlevel.checkpoint()
        if self.given_up or self.silent:
            raise LauncherSilent("cannot tell what becomes of the request")
        self.finish(job, signal=signal.SIGKILL)

    async def remove(self, job: JobId) -> None:
        with trio.CancelScope(shield=True):  # what was asked of a launcher has its effect
            await trio.lowlevel.checkpoint()
        if self.given_up and self.forgets_nothing:
            raise LauncherSilent("the service is shutting down", data={"sent": False})
        if self.refusals:
            self.refusals -= 1
            raise SandboxError("cannot serve the request: Too many open files")
        self.removed.append(job)


@define(eq=False)
class FakeHistory:
    """Remembers the records, in memory."""

    records: dict[JobId, JobRecord] = Factory(dict)
    notes: dict[JobId, JobRecord] = Factory(dict)
    _last: int = 0

    def take_id(self) -> JobId:
        self._last += 1
        return JobId(self._last)

    def keep_id(self, job: JobId) -> None:
        assert job <= self._last

    held: trio.Event | None = None
    """Set when a job that is being admitted is refused, if that waits for something."""
    slow: trio.Event | None = None
    """Set when what changes of a job is recorded, if that waits for something."""

    async def put(self, record: JobRecord, *, is_new: bool = False) -> None:
        if is_new and self.held is not None:
            await self.held.wait()
            raise InternalError("cannot record the job: another program has locked the history")
        if self.slow is not None:
            with trio.CancelScope(shield=True):
                await self.slow.wait()
        await trio.lowlevel.checkpoint()
        self.records[record.id] = record

    async def keep_note(self, record: JobRecord) -> None:
        await trio.lowlevel.checkpoint()
        self.notes[record.id] = record

    async def remove(self, job: JobId) -> None:
        await trio.lowlevel.checkpoint()
        self.records.pop(job, None)

    async def summary(self, job: JobId, _who: str = "") -> JobRecord | None:
        await trio.lowlevel.checkpoint()
        return self.records.get(job)

    async def mark_output_removed(self, jobs: Collection[JobId], when: datetime) -> None:
        await trio.lowlevel.checkpoint()
        for job in jobs:
            self.records[job] = evolve(self.records[job], output_removed_at=when)

    async def page(self, wanted: Filter, limit: int, _: str) -> Page:
        await trio.lowlevel.checkpoint()
        fit = [each for each in self.records.values() if wanted.fits(each)]
        return Page([(each.id, dumps(unstructure(each))) for each in fit[:limit]], None)


@asynccontextmanager
async def supervising(
    spools: Path,
    *,
    max_running: int,
    max_waiting: int = 100,
    clock: Clock = lambda: datetime.now(UTC),
    inheritance: Takeover | None = None,
) -> AsyncIterator[tuple[Supervisor, FakeLink, FakeHistory]]:
    link, history = FakeLink(), FakeHistory()
    archive = Archive(
        spools=spools,
        history=history,  # type: ignore[arg-type]
        policy=RetentionPolicy(),
        budget=OutputBudget(spools),
        clock=clock,
    )
    supervisor = Supervisor(
        launcher=link,  # type: ignore[arg-type]
        history=history,  # type: ignore[arg-type]
        archive=archive,
        spools=spools,
        rules=RULES,
        clock=clock,
        incidents=Incidents(),
        max_running=max_running,
        max_waiting=max_waiting,
    )
    supervisor.take_over(inheritance or Takeover())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.serve)
        yield supervisor, link, history
        nursery.cancel_scope.cancel()


def spec(name: str) -> JobSpec:
    return JobSpec(command=("true",), name=name)


@define(eq=False)
class SlowFirst:
    """Makes the first job's spool only when it may."""

    _create: object
    may: threading.Event = Factory(threading.Event)
    begun: threading.Event = Factory(threading.Event)

    def __call__(self, directory: Path) -> Spool:
        if directory.name == "1":
            self.begun.set()
            assert self.may.wait(20)
        return self._create(directory)  # type: ignore[no-any-return, operator]


async def test_job_admitted_at_once_is_not_overtaken_while_its_output_is_made_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowFirst(Spool.create)
    monkeypatch.setattr(Spool, "create", slow)
    admitted: dict[str, Execution] = {}

    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):

        async def submit(name: str) -> None:
            admitted[name] = await supervisor.submit(spec(name), "alice")

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(submit, "first")
                await trio.to_thread.run_sync(slow.begun.wait)
                await submit("second")
                assert admitted["second"].record.state is State.PENDING
                slow.may.set()
            assert link.spawned == [1]
            assert admitted["first"].record.state is State.RUNNING
            link.finish(JobId(1))
            await supervisor.wait(JobId(1))
            while link.spawned != [1, 2]:  # noqa: ASYNC110
                await trio.sleep(0.001)
            link.finish(JobId(2))
            await supervisor.wait(JobId(2))
    assert {record.state for record in history.records.values()} == {State.COMPLETED}


async def test_secrets_of_a_job_whose_output_is_being_made_ready_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowFirst(Spool.create)
    monkeypatch.setattr(Spool, "create", slow)
    secret = {f"S{number}": "x" * 100_000 for number in range(9)}
    request = JobSpec(command=("true",), secret_environment=secret)
    refused: list[Busy] = []

    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):

        async def submit() -> None:
            try:
                await supervisor.submit(request, "alice")
            except Busy as busy:
                refused.append(busy)
                slow.may.set()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(submit)  # it waits for its output
                await trio.to_thread.run_sync(slow.begun.wait)
                monkeypatch.setattr(secrets, "MAX_OWNER_BYTES", 1 << 20)
                nursery.start_soon(submit)
                with trio.move_on_after(5):
                    await trio.to_thread.run_sync(slow.may.wait, 5)
                slow.may.set()
            assert [("your waiting jobs" in busy.message) for busy in refused] == [True]
            link.finish(JobId(1))
            await supervisor.wait(JobId(1))


async def test_place_of_a_job_whose_output_cannot_be_made_ready_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1").write_text("in the way")
    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        with trio.fail_after(20):
            with pytest.raises(Exception, match="cannot create the job's output"):
                await supervisor.submit(spec("first"), "alice")
            second = await supervisor.submit(spec("second"), "alice")
            assert second.record.state is State.RUNNING
            link.finish(JobId(2))
            await supervisor.wait(JobId(2))


async def test_what_stands_in_the_place_of_output_stays_though_the_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr("jobworker.jobs.admission.make_note", refuse)
    async with supervising(tmp_path, max_running=1) as (supervisor, _, _):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "kept").write_text("another's")
        for _ in range(2):
            with pytest.raises(OutputError, match="the disk is full"):
                await supervisor.submit(spec("refused"), "alice")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"1", "1/kept"}


async def test_fault_of_ours_in_the_end_of_a_job_does_not_keep_the_service_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("jobworker.jobs.supervisor.REMOVE_SECONDS", 0)
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        execution = await supervisor.submit(spec("first"), "alice")
        with trio.fail_after(20):
            while history.records[JobId(1)].state is not State.RUNNING:  # noqa: ASYNC110
                await trio.sleep(0.001)
        monkeypatch.setattr(FakeHistory, "put", fail)
        link.finish(JobId(1))
        with trio.fail_after(20):
            await supervisor.shut_down(0)
        assert execution.record.state is State.COMPLETED


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


@pytest.mark.parametrize("seconds_ago", [0.0, 2.0])
async def test_job_ends_after_it_ran_though_the_clock_of_the_next_service_is_behind(
    tmp_path: Path, seconds_ago: float
) -> None:
    now = datetime(2026, 11, 24, tzinfo=UTC)
    record = JobRecord(
        id=JobId(1),
        spec=spec("taken over"),
        owner="alice",
        state=State.RUNNING,
        created_at=now,
        started_at=now + timedelta(minutes=1),
    )
    (out, out_write), (err, err_write) = (os.pipe2(os.O_NONBLOCK) for _ in range(2))
    os.close(out_write)
    os.close(err_write)
    send, exits = trio.open_memory_channel[JobExit](1)
    told_at = time.monotonic()
    ended_at = told_at - seconds_ago
    send.send_nowait(JobExit(code=0, signal=None, usage=Usage(), ended_at=ended_at))
    send.close()
    started = Started(pid=1, stdout=out, stderr=err, since=told_at - 8)
    taken = Takeover(running=[RunningJob(record, Spool.create(tmp_path / "1"), started, exits)])
    behind = now - timedelta(days=1)
    async with supervising(tmp_path, max_running=1, clock=lambda: behind, inheritance=taken) as (
        supervisor,
        _,
        history,
    ):
        with trio.fail_after(20):
            await supervisor.wait(JobId(1))
    ended = history.records[JobId(1)]
    assert ended.started_at is not None
    assert ended.ended_at is not None
    ran = (ended.ended_at - ended.started_at).total_seconds()
    assert abs(ran - (8 - seconds_ago)) < 0.1, "as long as the launcher says"


async def test_job_has_ended_when_it_exited_however_long_the_rest_of_its_output_takes(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    def clock() -> datetime:
        return datetime(2026, 11, 24, tzinfo=UTC) + timedelta(seconds=trio.current_time())

    async with supervising(tmp_path, max_running=1, clock=clock) as (supervisor, link, history):
        execution = await supervisor.submit(spec("job"), "alice")
        await trio.sleep(60)
        exited_at = clock()
        pipes = link.finish(JobId(1), keep_pipes=True)  # somebody outside of it has them
        await supervisor.wait(JobId(1))
        assert clock() - exited_at >= timedelta(seconds=DRAIN_SECONDS)
        await execution.forgotten.wait()
    for pipe in pipes:
        os.close(pipe)
    ended_at = history.records[JobId(1)].ended_at
    assert ended_at is not None
    assert abs(ended_at - exited_at) < timedelta(seconds=1)


async def test_output_that_was_taken_over_counts_as_what_stands_on_the_disk(
    tmp_path: Path,
) -> None:
    """That of a job that goes on, and that of one whose end has to be recorded still."""
    spools = [Spool.create(tmp_path / name) for name in ("1", "2")]
    for spool, size in zip(spools, (1000, 9000), strict=True):
        append(spool, Stream.STDOUT, b"x" * size)
    await spools[1].seal()
    (out, out_write), (err, err_write) = (os.pipe2(os.O_NONBLOCK) for _ in range(2))
    _send, exits = trio.open_memory_channel[JobExit](1)
    started = Started(pid=1, stdout=out, stderr=err)
    taken = Takeover(
        running=[RunningJob(record(1, State.RUNNING), spools[0], started, exits)],
        ended=[EndedJob(record(2), spools[1])],
    )
    async with supervising(tmp_path, max_running=2, inheritance=taken) as (supervisor, _, history):
        budget = supervisor._archive.budget
        with trio.fail_after(20):
            while JobId(2) not in history.records:  # noqa: ASYNC110
                await trio.sleep(0.01)
        there = [
            sum(file.stat().st_size for file in (tmp_path / name).iterdir()) for name in ("1", "2")
        ]
        assert [budget.live_bytes, budget.kept_bytes] == there
    os.close(out_write)
    os.close(err_write)


async def test_disk_that_hangs_below_one_owners_output_delays_no_other_owners_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    synced: list[str] = []
    noisy = [JobId(number) for number in range(1, 9)]

    def fdatasync(file: int) -> None:
        directory = Path(os.readlink(f"/proc/self/fd/{file}")).parent.name
        if int(directory) in noisy:
            assert go_on.wait(20)
        synced.append(directory)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr("jobworker.jobs.output.sync.SYNC_SECONDS", math.inf)
    async with supervising(tmp_path, max_running=20) as (supervisor, link, _):

        async def run(owner: str) -> Execution:
            execution = await supervisor.submit(spec("job"), owner)
            link.write(execution.record.id, b"text")
            link.finish(execution.record.id)
            return execution

        with trio.fail_after(10):
            loud = [await run("alice") for _ in noisy]
            await trio.testing.wait_all_tasks_blocked(0.1)
            quiet = await run("bob")
            await quiet.ended.wait()
            assert synced == [str(quiet.record.id)] * 3
            assert not any(each.ended.is_set() for each in loud)
            monkeypatch.setattr("jobworker.jobs.output.sync.SYNC_SECONDS", 0)
            late = await run("alice")
            await late.ended.wait()
            assert f"job {late.record.id}: its output is not synced after" in caplog.text
            while synced.count(str(late.record.id)) < 3:  # noqa: ASYNC110
                await trio.sleep(0.01)
            go_on.set()
            for each in loud:
                await each.ended.wait()
            assert len(synced) == 3 * (2 + len(noisy))
            monkeypatch.setattr("jobworker.jobs.output.sync.SYNC_SECONDS", math.inf)
            await (await run("alice")).ended.wait()


@pytest.mark.parametrize("seen_by", ["a look", "a reader"])
async def test_output_that_goes_between_the_end_and_the_archive_is_told_as_removed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seen_by: str,
) -> None:
    """The end is told, and the launcher takes its time to forget the job."""
    forgets = trio.Event()

    async def remove(_link: FakeLink, _job: JobId) -> None:
        await forgets.wait()

    monkeypatch.setattr(FakeLink, "remove", remove)
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        with trio.fail_after(20):
            execution = await supervisor.submit(spec("job"), "alice")
            job = execution.record.id
            link.write(job, b"text")
            link.finish(job)
            await execution.ended.wait()
            other = KeptOutput(tmp_path)  # as `worker prune` has it
            other.load()
            assert other.prune(RetentionPolicy(max_jobs=0))
            if seen_by == "a look":
                await supervisor._archive.prune()
            else:
                with pytest.raises(NotFound, match="it is not kept any more since"):
                    await supervisor.follow(job)
            forgets.set()
            await execution.forgotten.wait()
            await supervisor._archive.prune()
    assert history.records[job].output_removed_at is not None
    assert supervisor._archive._kept.missing == 0
    assert "missing" not in caplog.text
    assert list(tmp_path.iterdir()) == []


@define(eq=False)
class HeldStep:
    """A step of a job's end that waits for the disk, until the end of the block at the latest."""

    _step: Callable[..., None]
    begun: threading.Event = Factory(threading.Event)
    may: threading.Event = Factory(threading.Event)

    def __call__(self, *arguments: object) -> None:
        self.begun.set()
        assert self.may.wait(20)
        self._step(*arguments)

    def as_method(self) -> Callable[..., None]:
        """The step, as a method of a class."""

        def step(*arguments: object) -> None:
            self(*arguments)

        return step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.may.set()


async def ids_of(supervisor: Supervisor, *states: State) -> list[int]:
    page = await supervisor.latest(Filter(states=frozenset(states)), 10, "alice")
    return [number for number, _ in page.records]


async def check_shown_alive(supervisor: Supervisor) -> None:
    told = await supervisor.record(JobId(1))
    assert (told.state, told.stdout_bytes, told.stderr_bytes) == (State.RUNNING, 4, 4)
    assert (told.exit_code, told.ended_at, told.usage) == (None, None, None)
    assert await ids_of(supervisor, State.RUNNING) == [1]
    assert await ids_of(supervisor, State.COMPLETED) == []
    with pytest.raises(Busy, match="it has not ended"):
        await supervisor.remove(JobId(1), force=False)


@pytest.mark.parametrize("held", ["seal", "record", "sync"])
async def test_job_is_shown_alive_with_its_sizes_until_its_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    """While its output is sealed, its end recorded, or what it has written synced."""
    ends: list[JobRecord] = []
    monkeypatch.setattr("jobworker.jobs.output.sync.SYNC_SECONDS", math.inf)
    async with (
        supervising(tmp_path, max_running=1) as (supervisor, link, history),
        trio.open_nursery() as nursery,
    ):
        # The last to be left, also where this fails: what is held is waited for.
        with HeldStep(OutputFiles.seal if held == "seal" else os.fdatasync) as step:
            execution = await supervisor.submit(spec("first"), "alice")

            async def follow() -> None:
                with await supervisor.follow(JobId(1)) as follower:
                    data = b"".join([bytes(chunk.data) async for chunk in follower])
                assert data == b"texttext"
                ends.append(await supervisor.wait(JobId(1)))

            async def stop() -> None:
                ends.append(await supervisor.stop(JobId(1), signal.SIGTERM, None))

            link.write(JobId(1), b"text")
            with trio.fail_after(20):
                while execution.spool.size < 8:  # noqa: ASYNC110
                    await trio.sleep(0.001)
            if held == "seal":
                monkeypatch.setattr(OutputFiles, "seal", step.as_method())
            else:
                monkeypatch.setattr(os, "fdatasync", step)
            if held == "record":
                history.slow = trio.Event()
                step.may.set()
            try:
                link.finish(JobId(1))
                assert await trio.to_thread.run_sync(step.begun.wait, 20)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert history.records[JobId(1)].ended == (held == "sync")
                await check_shown_alive(supervisor)
                nursery.start_soon(follow)
                nursery.start_soon(stop)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert ends == []
            finally:
                if history.slow is not None:
                    history.slow.set()
    ended = history.records[JobId(1)]
    assert ends == [ended, ended]
    assert (ended.state, ended.stdout_bytes, ended.stderr_bytes) == (State.COMPLETED, 4, 4)
    assert ended.stop_requested_at is None


async def test_job_whose_start_has_failed_is_shown_as_it_was_until_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def submit(supervisor: Supervisor) -> None:
        execution = await supervisor.submit(spec("first"), "alice")
        assert execution.start_error is not None

    async with (
        supervising(tmp_path, max_running=1) as (supervisor, link, _),
        trio.open_nursery() as nursery,
    ):
        link.stuck = True
        link.let_go.set()
        with HeldStep(OutputFiles.seal) as step:
            monkeypatch.setattr(OutputFiles, "seal", step.as_method())
            nursery.start_soon(submit, supervisor)
            assert await trio.to_thread.run_sync(step.begun.wait, 20)
            told = await supervisor.record(JobId(1))
            assert (told.state, told.reason, told.detail) == (State.INITIALIZING, None, "")
        with trio.fail_after(20):
            assert (await supervisor.wait(JobId(1))).reason is Reason.START


async def test_end_that_a_note_has_told_is_whole_though_its_output_is_gone(tmp_path: Path) -> None:
    """From the first moment on, and while the history still refuses it."""
    end = record(1, stdout_bytes=4, stderr_bytes=5)
    taken = Takeover(ended=[EndedJob(end, Spool.gone())])
    async with supervising(tmp_path, max_running=1, inheritance=taken) as (supervisor, _, history):
        assert await supervisor.wait(JobId(1)) == end  # before anything else has run
        history.slow = trio.Event()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert await supervisor.record(JobId(1)) == end
        assert await supervisor.stop(JobId(1), signal.SIGTERM, None) == end
        history.slow.set()


async def test_waiting_job_whose_stop_an_earlier_service_was_asked_for_waits_for_no_place(
    tmp_path: Path,
) -> None:
    (out, out_write), (err, err_write) = (os.pipe2(os.O_NONBLOCK) for _ in range(2))
    _send, exits = trio.open_memory_channel[JobExit](1)
    started = Started(pid=1, stdout=out, stderr=err)
    stopped = record(2, State.PENDING, stop_requested_at=datetime.now(UTC))
    waits = record(3, State.PENDING)
    taken = Takeover(
        running=[
            RunningJob(record(1, State.RUNNING), Spool.create(tmp_path / "1"), started, exits)
        ],
        waiting=[
            WaitingJob(each, Spool.create(tmp_path / str(each.id))) for each in (stopped, waits)
        ],
    )
    async with supervising(tmp_path, max_running=1, inheritance=taken) as (supervisor, link, _):
        with trio.fail_after(20):
            ended = await supervisor.wait(JobId(2))
        assert ended == evolve(stopped, state=State.STOPPED, ended_at=ended.ended_at)
        assert [(await supervisor.record(JobId(job))).state for job in (1, 3)] == [
            State.RUNNING,
            State.PENDING,
        ]
        assert link.spawned == []
    os.close(out_write)
    os.close(err_write)


async def test_job_that_was_left_has_not_ended_whatever_is_known_of_it(tmp_path: Path) -> None:
    """Its exit is known, and a descendant holds its pipes: the next service sees to the rest."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        with trio.fail_after(20):
            execution = await supervisor.submit(spec("first"), "alice")
            while JobId(1) not in history.records:  # noqa: ASYNC110
                await trio.sleep(0.001)
            pipes = link.finish(JobId(1), keep_pipes=True)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await supervisor.leave()
    assert not execution.ended.is_set()
    assert not history.records[JobId(1)].ended
    for pipe in pipes:
        os.close(pipe)


async def test_job_whose_volume_could_not_be_looked_at_is_not_told_as_failed(
    tmp_path: Path,
) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        with trio.fail_after(20):
            await supervisor.submit(spec("first"), "alice")
            link.finish(JobId(1), unseen=("v",))
            record = await supervisor.wait(JobId(1))
    assert record.state is State.COMPLETED
    assert record.detail == (
        "whether all that it wrote to the volume v is kept is not known: the host could not look"
    )


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


async def test_service_that_leaves_does_not_wait_for_a_client_s_long_grace(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The stop is recorded, and the next service goes on with it."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        execution = await supervisor.submit(spec("stubborn"), "alice")
        execution.request_stop(signal.SIGTERM, 1e6)
        began = trio.current_time()
        await supervisor.leave()
        assert trio.current_time() - began < 60
        pipes = link.finish(JobId(1), keep_pipes=True)
    assert not execution.ended.is_set()
    assert history.records[JobId(1)].stop_requested_at is not None
    for pipe in pipes:
        os.close(pipe)


@pytest.mark.parametrize("force", [False, True])
async def test_job_that_was_left_is_not_removed(tmp_path: Path, force: bool) -> None:
    """The service answers still, since another job is being stopped."""
    async with supervising(tmp_path, max_running=2) as (supervisor, link, history):
        jobs = [
            await supervisor.submit(spec(name), "alice") for name in ("left", "stopped", "waits")
        ]
        jobs[1].request_stop(signal.SIGTERM, 100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.leave)
            with trio.fail_after(20):
                await jobs[0].forgotten.wait()
                await jobs[2].forgotten.wait()
            for job in (JobId(1), JobId(3)):
                with pytest.raises(ShuttingDown, match=f"cannot reach job {job}: it is left"):
                    await supervisor.remove(job, force=force)
                assert job in history.records
                assert (tmp_path / str(job) / "index").exists()
            link.finish(JobId(2))


async def test_service_that_leaves_does_not_wait_for_a_silent_launcher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        execution = await supervisor.submit(spec("left"), "alice")
        link.silent = True
        with trio.fail_after(20):
            await supervisor.leave()
        assert link.given_up
        assert not execution.ended.is_set()
    assert caplog.text.count("the launcher does not answer") == 1


@pytest.mark.parametrize("leaves", [True, False])
async def test_service_that_ends_does_not_wait_for_a_start_that_is_never_answered(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, leaves: bool
) -> None:
    """It is the next service's to find out what became of it: no end is made up."""
    async with (
        supervising(tmp_path, max_running=1) as (supervisor, link, history),
        trio.open_nursery() as nursery,
    ):
        link.stuck = True
        nursery.start_soon(supervisor.submit, spec("held"), "alice")
        while JobId(1) not in history.records:  # noqa: ASYNC110
            await trio.sleep(0.001)
        with trio.fail_after(30):
            await (supervisor.leave() if leaves else supervisor.shut_down(5))
    assert history.records[JobId(1)].state is State.INITIALIZING


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize(("max_running", "exits"), [(0, False), (1, False), (1, True)])
async def test_job_that_is_refused_while_the_service_ends_is_taken_back(
    tmp_path: Path, leaves: bool, max_running: int, exits: bool
) -> None:
    """It waits, runs already, or has exited; its client is told that there is no such job."""
    async with supervising(tmp_path, max_running=max_running) as (supervisor, link, history):
        history.held, history.slow = trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:

            async def submit() -> None:
                with pytest.raises(InternalError, match="locked the history"):
                    await supervisor.submit(spec("refused"), "alice")

            nursery.start_soon(submit)
            while supervisor.live(JobId(1)) is None:  # noqa: ASYNC110
                await trio.sleep(0.001)
            refused = supervisor.live(JobId(1))
            assert refused is not None
            if max_running:
                while not link.spawned:  # noqa: ASYNC110
                    await trio.sleep(0.001)
            if exits:
                link.finish(JobId(1))
            nursery.start_soon(supervisor.leave if leaves else lambda: supervisor.shut_down(5))
            await trio.testing.wait_all_tasks_blocked(0.05)
            history.held.set()
            try:
                with trio.fail_after(20):
                    while max_running and not link.removed:  # noqa: ASYNC110
                        await trio.sleep(0.001)
            finally:  # not before the launcher was told
                history.slow.set()
        with trio.fail_after(20):
            await refused.forgotten.wait()
    assert set(link.removed) == {JobId(1)} if max_running else not link.removed
    assert history.records == {}
    assert list(tmp_path.iterdir()) == []


async def test_job_that_was_refused_is_removed_though_it_cannot_be_killed_in_time(
    tmp_path: Path,
) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        history.held = trio.Event()
        async with trio.open_nursery() as nursery:

            async def submit() -> None:
                with pytest.raises(InternalError, match="locked the history"):
                    await supervisor.submit(spec("stuck"), "alice")

            nursery.start_soon(submit)
            while not link.spawned:  # noqa: ASYNC110
                await trio.sleep(0.001)
            link.silent = True
            history.held.set()
        execution = supervisor.live(JobId(1))
        assert execution is not None
        await supervisor.leave()
        with trio.fail_after(20):
            await execution.forgotten.wait()
        pipes = link.finish(JobId(1), keep_pipes=True)
    assert link.removed == [JobId(1)]
    assert history.records == {}
    assert list(tmp_path.iterdir()) == []
    for pipe in pipes:
        os.close(pipe)


async def test_what_was_discarded_is_recorded_where_its_index_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say, which is why it was discarded. The history has room set aside."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        execution = await supervisor.submit(spec("left"), "alice")
        monkeypatch.setattr(OutputFiles, "record_discarded", lambda _: False)
        execution.spool.count_discarded(9)
        with trio.fail_after(20):
            await supervisor.leave()
        pipes = link.finish(JobId(1), keep_pipes=True)
    assert not execution.ended.is_set()
    assert history.records[JobId(1)].discarded_bytes == 9
    for pipe in pipes:
        os.close(pipe)


async def test_cut_that_is_being_recorded_while_the_job_is_left_is_recorded(tmp_path: Path) -> None:
    """Also where the history takes its time, and then not this record."""
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        limits = Limits(output_bytes=1)
        execution = await supervisor.submit(evolve(spec("left"), limits=limits), "alice")
        history.slow = trio.Event()
        link.write(JobId(1), b"text")
        with trio.fail_after(20):
            while execution.record.output_cut is None:  # noqa: ASYNC110
                await trio.sleep(0.01)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.leave)
                await trio.testing.wait_all_tasks_blocked()
                history.slow.set()
        pipes = link.finish(JobId(1), keep_pipes=True)
    assert history.records[JobId(1)].output_cut is OutputCut.LIMIT
    for pipe in pipes:
        os.close(pipe)


async def test_gap_that_no_disk_takes_the_record_of_is_told_in_the_log_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise InternalError("cannot record the job: disk I/O error")

    async with supervising(tmp_path, max_running=1) as (supervisor, link, _):
        execution = await supervisor.submit(spec("left"), "alice")
        monkeypatch.setattr(OutputFiles, "record_discarded", lambda _: False)
        monkeypatch.setattr(FakeHistory, "put", refuse)
        execution.spool.count_discarded(9)
        with trio.fail_after(20):
            await supervisor.leave()
        pipes = link.finish(JobId(1), keep_pipes=True)
    assert "no disk takes the record that 9 bytes of its output were discarded" in caplog.text
    for pipe in pipes:
        os.close(pipe)


async def test_start_that_was_never_sent_waits_for_the_next_service(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with (
        supervising(tmp_path, max_running=1) as (supervisor, link, history),
        trio.open_nursery() as nursery,
    ):
        link.stuck, link.sends = True, False
        nursery.start_soon(supervisor.submit, spec("held"), "alice")
        while JobId(1) not in history.records:  # noqa: ASYNC110
            await trio.sleep(0.001)
        with trio.fail_after(30):
            await supervisor.leave()
    assert history.records[JobId(1)].state is State.PENDING
