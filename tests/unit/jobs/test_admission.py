"""The admission of jobs: what is refused, and with what a job begins."""

import math
import os
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing
from attrs import evolve

from jobworker.errors import (
    Busy,
    InternalError,
    LauncherSilent,
    OutputError,
    QuotaExceeded,
    ShuttingDown,
    TooLarge,
)
from jobworker.jobs import secrets
from jobworker.jobs.execution import Execution
from jobworker.jobs.inheritance import EndedJob, RunningJob, Takeover, WaitingJob
from jobworker.jobs.output.spool import Spool
from jobworker.model.access import Quota
from jobworker.model.job import JobId, JobSpec, Limits, Stream
from jobworker.model.lifecycle import State
from jobworker.sandbox.service.job_ends import Started
from jobworker.sandbox.service.job_reports import JobExit

from ..strategies import record
from .output.written_logs import append
from .supervised import RULES, FakeLink, SlowFirst, spec, supervising


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


# --- what is refused before anything is made --------------------------------------------------


@pytest.mark.parametrize("leaves", [True, False])
async def test_service_that_ends_admits_nothing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, leaves: bool
) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, _, history):
        await (supervisor.leave() if leaves else supervisor.shut_down(0))
        with pytest.raises(ShuttingDown):
            await supervisor.submit(spec("late"), "alice")
    assert (history.records, list(tmp_path.iterdir())) == ({}, [])


async def test_nothing_is_admitted_while_the_launcher_is_silent(tmp_path: Path) -> None:
    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        link.silent = True
        with pytest.raises(LauncherSilent):
            await supervisor.submit(spec("job"), "alice")
    assert (link.spawned, history.records, list(tmp_path.iterdir())) == ([], {}, [])


async def test_job_whose_output_is_being_made_ready_counts_to_its_owner_s_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quota = SlowFirst(Spool.create), Quota(jobs=1)
    monkeypatch.setattr(Spool, "create", slow)
    async with supervising(tmp_path, max_running=3) as (supervisor, link, _):
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.submit, spec("first"), "alice", quota)
                assert await trio.to_thread.run_sync(slow.begun.wait, 20)
                with pytest.raises(QuotaExceeded):
                    await supervisor.submit(spec("second"), "alice", quota)
                await supervisor.submit(spec("other"), "bob", quota)
                slow.may.set()
        finally:
            slow.may.set()
        for job in (1, 2):
            link.finish(JobId(job))
            await supervisor.wait(JobId(job))


async def test_ended_job_that_the_launcher_has_still_counts_to_no_quota(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    quota = Quota(jobs=1)
    async with supervising(tmp_path, max_running=3) as (supervisor, link, _):
        await supervisor.submit(spec("first"), "alice", quota)
        with pytest.raises(QuotaExceeded):
            await supervisor.submit(spec("second"), "alice", quota)
        link.refusals = 10**9
        link.finish(JobId(1))
        await supervisor.wait(JobId(1))
        assert supervisor.live(JobId(1)) is not None
        await supervisor.submit(spec("third"), "alice", quota)
        link.refusals = 0
        link.finish(JobId(2))
        await supervisor.wait(JobId(2))


# --- what a job is admitted with --------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "default", "longest", "expected"),
    [
        (None, 0, math.inf, 0),
        (None, 0, 60, 60),
        (None, 10, 60, 10),
        (None, 100, 60, 60),
        (None, 100, math.inf, 100),
        (5, 100, 60, 5),
    ],
)
async def test_job_that_names_no_time_limit_gets_the_shorter_of_default_and_longest(
    tmp_path: Path, asked: float | None, default: float, longest: float, expected: float
) -> None:
    """0 is none, which is longer than any other."""
    rules = evolve(RULES, timeout_seconds=default)
    async with supervising(tmp_path, max_running=1, rules=rules) as (supervisor, link, _):
        request = evolve(spec("job"), timeout_seconds=asked)
        execution = await supervisor.submit(request, "alice", longest_seconds=longest)
        assert execution.record.spec.timeout_seconds == expected
        link.finish(JobId(1))
        await supervisor.wait(JobId(1))


async def test_plan_has_the_defaults_and_no_secrets_and_starts_nothing(tmp_path: Path) -> None:
    rules = evolve(RULES, defaults=evolve(RULES.defaults, memory_bytes=1 << 30))
    request = evolve(spec("job"), secret_environment={"TOKEN": "x"}, limits=Limits(processes=9))
    async with supervising(tmp_path, max_running=1, rules=rules) as (supervisor, link, _):
        limits, steps = await supervisor.plan(request)
        assert (limits.memory_bytes, limits.processes) == (1 << 30, 9)
        assert steps == [("step", "does", "something")]
        assert "TOKEN" not in link.planned[0].environment
        with pytest.raises(TooLarge):
            await supervisor.plan(JobSpec(command=tuple(["x" * 100_000] * 30)))
    assert (link.spawned, list(tmp_path.iterdir())) == ([], [])


async def test_large_request_of_a_waiting_job_does_not_stay_in_memory(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    large = evolve(spec("large"), command=("true", "x" * 100_000))
    async with supervising(tmp_path, max_running=0) as (supervisor, _, history):
        execution = await supervisor.submit(large, "alice")
        assert execution.record.abridged == ("command",)
        assert history.records[JobId(1)].spec.command == large.command
        await supervisor.stop(JobId(1), signal.SIGTERM, None)


# --- disks that refuse ------------------------------------------------------------------------


async def test_nothing_is_left_of_a_job_whose_note_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OutputError("cannot create the job's output: No space left on device")

    async with supervising(tmp_path, max_running=1) as (supervisor, link, history):
        with monkeypatch.context() as patch:
            patch.setattr("jobworker.jobs.admission.make_note", refuse)
            with pytest.raises(OutputError, match="No space left"):
                await supervisor.submit(spec("first"), "alice")
        assert (list(tmp_path.iterdir()), history.records) == ([], {})
        second = await supervisor.submit(spec("second"), "alice")
        assert second.record.state is State.RUNNING
        link.finish(JobId(2))
        await supervisor.wait(JobId(2))


async def test_refusal_that_no_disk_takes_the_note_of_is_told_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets the first error all the same."""

    def refuse(*_: object) -> None:
        raise OutputError("cannot write the job's output: Input/output error")

    monkeypatch.setattr("jobworker.jobs.admission.note_refusal", refuse)
    async with supervising(tmp_path, max_running=1) as (supervisor, _, history):
        history.held = trio.Event()
        history.held.set()
        with pytest.raises(InternalError, match="locked the history"):
            await supervisor.submit(spec("job"), "alice")
    assert "job 1 is refused, and the disk refuses to note that" in caplog.text


async def test_output_of_jobs_that_were_taken_over_counts_before_the_first_one_goes_on(
    tmp_path: Path,
) -> None:
    spools = [Spool.create(tmp_path / name) for name in ("1", "2")]
    for each in spools:
        append(each, Stream.STDOUT, b"x" * 1000)
    await spools[1].seal()
    link = FakeLink()
    running = RunningJob(record(1, State.RUNNING), spools[0], *link.begin(JobId(1)))
    taken = Takeover(running=[running], ended=[EndedJob(record(2), spools[1])])
    there = sum(each.written_bytes + each.index_bytes for each in spools)
    async with supervising(tmp_path, max_running=2, inheritance=taken, link=link) as (
        supervisor,
        _,
        __,
    ):
        assert supervisor._archive.budget.live_bytes == there > 2000
        link.finish(JobId(1))
        await supervisor.wait(JobId(1))


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
