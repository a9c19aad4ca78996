"""The mover: what becomes of a job's output, and of the job, where no more of it can be kept."""

import math
import os
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from jobworker.errors import OutputError
from jobworker.jobs.output import mover as output_mover
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.output.mover import OutputMover, OutputRoom
from jobworker.jobs.output.pace import OutputPace
from jobworker.jobs.output.pump import Pump
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import OutputCut, Stream

from .test_pump import crowded, until


def mover_of(
    spool: Spool,
    budget: OutputBudget,
    make_room: Callable[[], Awaitable[bool]],
    told: list[OutputCut],
    max_bytes: int | None = None,
    keep_cut: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
) -> OutputMover:
    return OutputMover(
        spool=spool,
        max_bytes=max_bytes,
        room=OutputRoom(owner="alice", budget=budget, pace=OutputPace(), make_room=make_room),
        tell_cut=lambda cut, _: told.append(cut),
        keep_cut=keep_cut,
        cut=None,
    )


@pytest.mark.parametrize("fault", [OutputError("cannot look"), OSError(5, "I/O"), ValueError("?")])
async def test_fault_of_those_who_make_room_cuts_output_and_is_no_end(
    tmp_path: Path, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def make_room() -> bool:
        raise fault

    told: list[OutputCut] = []
    spool = Spool.create(tmp_path / "job")
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    mover = mover_of(spool, OutputBudget(tmp_path, max_bytes=1000), make_room, told)
    with trio.fail_after(20):
        async with mover.moving({Stream.STDOUT: read_end}):
            os.write(write_end, b"x" * 3000)
            os.close(write_end)
    sizes = spool.statistics()
    spool.close()
    assert (sizes.stdout_bytes, sizes.discarded_bytes, told) == (1000, 2000, [OutputCut.TOTAL])
    assert str(fault) in caplog.text


@pytest.mark.parametrize("is_made", [True, False])
async def test_job_that_ends_while_room_is_being_made_loses_nothing_for_which_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_made: bool
) -> None:
    """Who makes room may wait for the history, far longer than an end waits for what comes late."""
    monkeypatch.setattr(output_mover, "DRAIN_SECONDS", 0)
    budget, asked = OutputBudget(tmp_path, max_bytes=1000), trio.Event()

    async def make_room() -> bool:
        if not asked.is_set():
            asked.set()
            await trio.sleep_forever()  # until the job's end
        if is_made:
            budget.max_bytes = 10_000
        return is_made

    told: list[OutputCut] = []
    spool = Spool.create(tmp_path / "job")
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    with trio.fail_after(20):
        async with mover_of(spool, budget, make_room, told).moving({Stream.STDOUT: read_end}):
            os.write(write_end, b"x" * 3000)
            os.close(write_end)
            await asked.wait()
    sizes = spool.statistics()
    spool.close()
    kept, cuts = (3000, []) if is_made else (1000, [OutputCut.TOTAL])
    assert (sizes.stdout_bytes, sizes.discarded_bytes, told) == (kept, 3000 - kept, cuts)


async def test_cut_is_kept_before_anything_is_discarded_for_it(tmp_path: Path) -> None:
    """Else a service that is killed in between leaves a gap, and the next goes on behind it."""
    kept: list[tuple[list[OutputCut], int]] = []

    async def make_room() -> bool:
        return False

    async def keep_cut() -> None:
        await trio.lowlevel.checkpoint()
        kept.append((list(told), spool.statistics().discarded_bytes))

    told: list[OutputCut] = []
    spool = Spool.create(tmp_path / "job")
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    budget = OutputBudget(tmp_path, max_bytes=1000)
    mover = mover_of(spool, budget, make_room, told, keep_cut=keep_cut)
    with trio.fail_after(20):
        async with mover.moving({Stream.STDOUT: read_end}):
            os.write(write_end, b"x" * 3000)
            os.close(write_end)
    discarded = spool.statistics().discarded_bytes
    spool.close()
    assert (kept, discarded) == ([([OutputCut.TOTAL], 0)], 2000)


async def test_limit_that_is_reached_while_a_job_is_left_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread has begun to discard, and its word comes after the cancellation."""
    begun, go_on, told = trio.Event(), threading.Event(), list[OutputCut]()
    token, discard = trio.lowlevel.current_trio_token(), Pump._discard

    def slowly(pump: Pump, stream: Stream, limit: int) -> int:
        token.run_sync_soon(begun.set)
        assert go_on.wait(20)
        return discard(pump, stream, limit)

    async def make_room() -> bool:
        raise AssertionError

    async def leave(company: trio.CancelScope) -> None:
        await begun.wait()
        company.cancel()
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()

    monkeypatch.setattr(Pump, "_discard", slowly)
    spool = Spool.create(tmp_path / "job")
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    mover = mover_of(spool, OutputBudget(tmp_path), make_room, told, max_bytes=0)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as company:
                nursery.start_soon(leave, company)
                async with mover.moving({Stream.STDOUT: read_end}):
                    os.write(write_end, b"x" * 10)
                    await trio.sleep(math.inf)
    os.close(write_end)
    discarded = spool.statistics().discarded_bytes
    spool.close()
    assert (discarded, told) == (10, [OutputCut.LIMIT])


async def test_end_of_a_job_does_not_wait_for_a_rest_of_its_output(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async def make_room() -> bool:
        return False

    spool, pace = Spool.create(tmp_path / "job"), crowded()
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    mover = OutputMover(
        spool=spool,
        max_bytes=None,
        room=OutputRoom(
            owner="alice", budget=OutputBudget(tmp_path), pace=pace, make_room=make_room
        ),
        tell_cut=lambda *_: None,
        keep_cut=trio.lowlevel.checkpoint,
        cut=None,
    )
    async with mover.moving({Stream.STDOUT: read_end}):
        for moves in (1, 2):
            os.write(write_end, b"x")
            await until(partial(pace.has_seen, moves))
        os.write(write_end, b"x")
        os.close(write_end)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert spool.size == 2, "the control"
    assert (spool.size, mock_clock.current_time()) == (3, 0)
    spool.close()
