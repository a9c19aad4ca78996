"""The start of a job: tried again, given up, left, or failed."""

import errno
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing
from attrs import Factory, define, evolve

from jobworker.errors import (
    JobworkerError,
    LauncherGone,
    OutOfDescriptors,
    SandboxError,
)
from jobworker.jobs.ending import Ending
from jobworker.jobs.live_record import LiveRecord
from jobworker.jobs.secrets import Secrets
from jobworker.jobs.starting import START_PATIENCE_SECONDS, Starting
from jobworker.model.job import JobId, JobRecord
from jobworker.model.lifecycle import Reason, State
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.start.plan import Order

from ..strategies import record
from .supervised import spec, supervising
from .test_live_record import NOON, History, history, live

__all__ = ["history", "live"]

GIVEN_UP = {"step": "start", "errno": errno.ECANCELED}


@define(eq=False)
class Launcher:
    """Answers each start with what stands next in `answers`, and starts a job after those."""

    answers: list[JobworkerError] = Factory(list)
    hangs: trio.Event | None = None
    orders: list[Order] = Factory(list)
    given_up: list[float] = Factory(list)

    async def spawn(self, _job: JobId, order: Order, _limits: object) -> tuple[Started, Exits]:
        await trio.lowlevel.checkpoint()
        self.orders.append(order)
        if self.hangs is not None:
            await self.hangs.wait()
        if self.answers:
            raise self.answers.pop(0)
        return Started(pid=1, stdout=-1, stderr=-1), cast("Exits", None)

    async def give_up_start(self, _job: JobId) -> None:
        await trio.lowlevel.checkpoint()
        self.given_up.append(trio.current_time())
        if self.hangs is not None:
            self.hangs.set()


@pytest.fixture
def launcher() -> Launcher:
    return Launcher()


@pytest.fixture
def ending(launcher: Launcher) -> Ending:
    return Ending(job=JobId(1), launcher=launcher, grace_seconds=1)  # type: ignore[arg-type]


@pytest.fixture
def live_record(live: LiveRecord) -> LiveRecord:
    live.record = record(1, State.PENDING)
    return live


def starting(
    live_record: LiveRecord, launcher: Launcher, ending: Ending, *, once: bool = False
) -> Starting:
    return Starting(
        live_record=live_record,
        launcher=launcher,  # type: ignore[arg-type]
        ending=ending,
        is_tried_once=once,
        secrets=Secrets(['{"TOKEN":"secret"}']),
    )


async def test_job_starts_with_its_secrets_which_are_kept_no_longer(
    autojump_clock: trio.testing.MockClock,
    live_record: LiveRecord,
    launcher: Launcher,
    ending: Ending,
    history: History,
) -> None:
    start = starting(live_record, launcher, ending)
    assert isinstance(await start.run(), tuple)
    assert launcher.orders[0].environment["TOKEN"] == "secret"
    assert await start.secrets.values() == {}
    assert live_record.record.state is State.RUNNING
    assert live_record.record.started_at is not None
    assert [each.state for each in history.stored] == [State.INITIALIZING]


async def test_start_that_lacked_something_is_tried_again_and_pending_meanwhile(
    autojump_clock: trio.testing.MockClock,
    live_record: LiveRecord,
    launcher: Launcher,
    ending: Ending,
    history: History,
) -> None:
    launcher.answers = [
        OutOfDescriptors("no descriptor is left"),
        SandboxError("no process is left", data={"errno": errno.EAGAIN}),
    ]
    assert isinstance(await starting(live_record, launcher, ending).run(), tuple)
    states = [each.state for each in history.stored]
    assert states == [State.INITIALIZING, State.PENDING] * 2 + [State.INITIALIZING]


async def test_client_that_waits_for_a_start_is_told_at_once_that_it_failed(
    autojump_clock: trio.testing.MockClock,
    live_record: LiveRecord,
    launcher: Launcher,
    ending: Ending,
) -> None:
    launcher.answers = [OutOfDescriptors("no descriptor is left")]
    start = starting(live_record, launcher, ending, once=True)
    end = await start.run()
    assert isinstance(end, JobRecord)
    assert (end.state, end.reason) == (State.FAILED, Reason.START)
    assert start.error is not None
    assert start.error.__traceback__ is None, "its frames would keep the secrets"


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (SandboxError("no such command", data={"errno": errno.ENOENT}), Reason.START, None),
        (LauncherGone("the launcher has ended"), Reason.LOST, None),
    ],
)
async def test_failed_start_is_the_end(
    autojump_clock: trio.testing.MockClock,
    live_record: LiveRecord,
    launcher: Launcher,
    ending: Ending,
    error: JobworkerError,
    reason: Reason,
    code: int | None,
) -> None:
    launcher.answers = [error]
    end = await starting(live_record, launcher, ending).run()
    assert isinstance(end, JobRecord)
    assert (end.reason, end.exit_code) == (reason, code)
    assert error.message in end.detail


async def test_waiting_job_that_is_stopped_is_not_started(
    autojump_clock: trio.testing.MockClock,
    live_record: LiveRecord,
    launcher: Launcher,
    ending: Ending,
) -> None:
    ending.stopping = True
    end = await starting(live_record, launcher, ending).run()
    assert isinstance(end, JobRecord)
    assert (end.state, launcher.orders) == (State.STOPPED, [])


async def test_waiting_job_is_left_to_the_next_service(
    autojump_clock: trio.testing.MockClock,
    live_record: LiveRecord,
    launcher: Launcher,
    ending: Ending,
) -> None:
    start = starting(live_record, launcher, ending)
    start.waits_for_the_next = True
    assert await start.run() is None
    assert (live_record.record.state, launcher.orders) == (State.PENDING, [])


async def test_start_under_way_is_given_up_after_a_while_and_the_job_ends_as_stopped(
    autojump_clock: trio.testing.MockClock,
    live_record: LiveRecord,
    launcher: Launcher,
    ending: Ending,
) -> None:
    launcher.hangs = trio.Event()
    launcher.answers = [SandboxError("given up", data=GIVEN_UP)]
    start, ends = starting(live_record, launcher, ending), list[object]()

    async def run() -> None:
        ends.append(await start.run())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.sleep(5)
        assert launcher.given_up == [], "nobody has asked for its end"
        asked_at = trio.current_time()
        ending.stopping = True
        start.give_up()
    assert launcher.given_up == [asked_at + START_PATIENCE_SECONDS]
    assert [getattr(end, "state", None) for end in ends] == [State.STOPPED]


async def test_start_of_which_nothing_is_known_at_the_service_s_end_is_undecided(
    autojump_clock: trio.testing.MockClock,
    live_record: LiveRecord,
    launcher: Launcher,
    ending: Ending,
    history: History,
) -> None:
    live_record.record = evolve(live_record.record, state=State.INITIALIZING)
    launcher.answers = [SandboxError("it went away", data={"errno": errno.EPIPE})]
    start = starting(live_record, launcher, ending)
    start.is_left = ending.stopping = True
    live_record.record = evolve(live_record.record, stop_requested_at=NOON)
    assert await start.run() is None
    assert "cannot tell what becomes of job 1" in str(start.error)
    assert [each.stop_requested_at for each in history.stored] == [NOON], "the next one goes on"


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
