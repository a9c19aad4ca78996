"""What is said of an end: the cause that came first, if it reached the job before that ended."""

import errno
import time
from signal import SIGINT, SIGKILL, SIGTERM, Signals

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from jobworker.errors import NotFound, SandboxError
from jobworker.jobs.end_words import memory_words
from jobworker.jobs.ending import Ending
from jobworker.model.job import JobId, Usage
from jobworker.model.lifecycle import Event, Reason
from jobworker.sandbox.cgroup.accounting import Want
from jobworker.sandbox.protocol import events
from jobworker.sandbox.protocol.end_requests import OUTPUT, STOP, TIMEOUT, EndRequest
from jobworker.sandbox.service.job_reports import EarlierEndRequest, JobExit, exit_from

EXITED = JobExit(code=0, signal=None, usage=Usage())
KILLED = JobExit(code=None, signal=9, usage=Usage())


class OneJob:
    """A launcher with one job that heeds no signal but is there, or has ended."""

    def __init__(self) -> None:
        self.there, self.got, self.asks = True, list[int](), list[EndRequest]()

    async def signal(self, _: JobId, number: Signals, ask: EndRequest) -> bool:
        self.asks.append(ask)
        return await self._send(number)

    async def kill(self, _: JobId, ask: EndRequest) -> None:
        self.asks.append(ask)
        await self._send(SIGKILL)

    async def _send(self, number: Signals) -> bool:
        await trio.lowlevel.checkpoint()
        if not self.there:
            raise NotFound("cannot reach the job: no such job")
        self.got.append(number)
        return True


class ShortOfDescriptors(OneJob):
    """A launcher that can do nothing for a while, and says so."""

    def __init__(self, refusals: int) -> None:
        super().__init__()
        self.refusals = refusals

    async def _send(self, number: Signals) -> bool:
        if self.refusals:
            self.refusals -= 1
            await trio.lowlevel.checkpoint()
            raise SandboxError("cannot: no descriptor", data={"errno": errno.EMFILE})
        return await super()._send(number)


def ending_of(launcher: OneJob) -> Ending:
    return Ending(job=JobId(1), launcher=launcher, grace_seconds=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("refusals", [1, 2, 5])
async def test_job_is_killed_though_the_launcher_refused_for_a_while(
    autojump_clock: MockClock, refusals: int
) -> None:
    launcher = ShortOfDescriptors(refusals)
    ending = ending_of(launcher)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ending.serve)
        ending.stop(SIGTERM, None)
        await wait_all_tasks_blocked()
        ending.stop(SIGINT, None)
        await trio.sleep(20)
        nursery.cancel_scope.cancel()
    assert launcher.got[-1] == SIGKILL
    assert ending.verdict(KILLED) == (Event.STOP, None)


async def test_job_that_has_ended_is_not_asked_for_again(autojump_clock: MockClock) -> None:
    launcher = OneJob()
    launcher.there = False
    ending = ending_of(launcher)
    ending.stop(SIGTERM, None)
    with trio.fail_after(1):
        await ending.serve()


@pytest.mark.parametrize(
    ("causes", "verdict"),
    [
        ((), (Event.SUCCEED, None)),
        ((STOP,), (Event.STOP, None)),
        ((OUTPUT,), (Event.FAIL, Reason.OUTPUT)),
        ((TIMEOUT,), (Event.FAIL, Reason.TIMEOUT)),
        ((STOP, OUTPUT), (Event.STOP, None)),
        ((STOP, TIMEOUT), (Event.STOP, None)),
        ((OUTPUT, STOP), (Event.FAIL, Reason.OUTPUT)),
        ((OUTPUT, TIMEOUT, STOP), (Event.FAIL, Reason.OUTPUT)),
        ((TIMEOUT, STOP), (Event.FAIL, Reason.TIMEOUT)),
        ((TIMEOUT, OUTPUT, STOP), (Event.FAIL, Reason.TIMEOUT)),
    ],
)
async def test_cause_that_came_first_is_told(
    autojump_clock: MockClock, causes: tuple[str, ...], verdict: tuple[Event, Reason | None]
) -> None:
    launcher = OneJob()
    ending = ending_of(launcher)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ending.serve)
        for cause in causes:
            if cause == STOP:
                ending.stop(SIGTERM, None)
            elif cause == OUTPUT:
                ending.stop_for_output()
            else:
                await ending.time_out(1)
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert ending.verdict(EXITED) == verdict
    assert ending.under_way == bool(causes)
    assert ending.stopping == (STOP in causes)


async def test_stop_of_a_job_that_has_exited_changes_nothing(autojump_clock: MockClock) -> None:
    """Its output may still be on its way."""
    ending = ending_of(OneJob())
    ending.exited = True
    ending.stop(SIGTERM, None)
    ending.stop_for_output()
    assert not ending.stopping
    assert not ending.under_way
    assert ending.verdict(EXITED) == (Event.SUCCEED, None)


@pytest.mark.parametrize("grace_seconds", [None, 0])
async def test_stop_that_reaches_nobody_is_no_cause(
    autojump_clock: MockClock, grace_seconds: float | None
) -> None:
    """The job ended by itself while the request was on its way."""
    launcher = OneJob()
    launcher.there = False
    ending = ending_of(launcher)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ending.serve)
        ending.stop(SIGTERM, grace_seconds)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert ending.verdict(EXITED) == (Event.SUCCEED, None)
    assert ending.verdict(KILLED) == (Event.FAIL, Reason.SIGNAL)


async def test_stop_without_grace_kills(autojump_clock: MockClock) -> None:
    launcher = OneJob()
    ending = ending_of(launcher)
    async with trio.open_nursery() as nursery:
        ending.stop(SIGTERM, 0)
        nursery.start_soon(ending.serve)
    assert SIGKILL in launcher.got
    assert ending.verdict(KILLED) == (Event.STOP, None)


async def test_launcher_that_went_is_what_is_told_whatever_was_asked(
    autojump_clock: MockClock,
) -> None:
    ending = ending_of(OneJob())
    ending.stop(SIGTERM, None)
    assert ending.verdict(None) == (Event.FAIL, Reason.LOST)


@pytest.mark.parametrize(
    ("want", "code", "number", "reason", "words"),
    [
        ("", None, 9, Reason.SIGNAL, ""),
        ("limit", None, 9, Reason.OOM, ""),
        ("limit", 0, None, Reason.OOM, ""),  # v1: it ended before the launcher could end it all
        ("limit", 1, None, Reason.OOM, ""),
        ("host", None, 9, Reason.OOM, "it was killed for memory: the host"),
        ("host", None, 11, Reason.SIGNAL, "2 of its processes were killed for memory: the host"),
        ("host", 0, None, None, "2 of its processes were killed for memory: the host"),
        ("host", 3, None, Reason.EXIT, "2 of its processes were killed for memory: the host"),
        ("kernel", None, 9, Reason.OOM, "it was killed for memory: it held more of the kernel's"),
        ("kernel", 0, None, None, ""),  # it had ended when the launcher came to kill it
    ],
)
async def test_want_of_memory_is_told_apart(
    want: Want, code: int | None, number: int | None, reason: Reason | None, words: str
) -> None:
    ended = JobExit(code=code, signal=number, usage=Usage(oom_kills=2), want=want)
    assert ending_of(OneJob()).verdict(ended)[1] is reason
    assert memory_words(ended, reason).startswith(words)
    assert bool(memory_words(ended, reason)) == bool(words)


async def test_stop_that_came_first_stays_what_is_told(autojump_clock: MockClock) -> None:
    ending = ending_of(OneJob())
    async with trio.open_nursery() as nursery:
        ending.stop(SIGTERM, 0)
        nursery.start_soon(ending.serve)
    ended = JobExit(code=None, signal=9, usage=Usage(oom_kills=1), want="host")
    assert ending.verdict(ended) == (Event.STOP, None)
    assert memory_words(ended, None).startswith("1 of its processes was killed for memory")


@pytest.mark.parametrize(
    ("told", "kills", "want"),
    [
        ({}, 1, "limit"),
        ({}, 0, ""),
        ({"want": "host"}, 1, "host"),
        ({"want": "kernel"}, 1, "kernel"),
        ({"want": ""}, 1, ""),
        ({"want": "of a later release"}, 1, "limit"),
    ],
)
def test_launcher_of_another_release_need_not_tell_what_memory_was_wanted(
    told: dict[str, object], kills: int, want: Want
) -> None:
    message = {"code": None, "signal": 9, "usage": {"pids": 0, "oom_kills": kills}, **told}
    ended = events.read({"event": "exit", "job": 1, **message})
    assert isinstance(ended, events.JobEnded)
    assert exit_from(ended).want == want


async def test_cause_and_deadline_go_with_the_signal(autojump_clock: MockClock) -> None:
    launcher = OneJob()
    ending = ending_of(launcher)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ending.serve)
        await ending.time_out(1)
        await wait_all_tasks_blocked()
        ending.stop(SIGINT, 600)
        await trio.sleep(20)
        nursery.cancel_scope.cancel()
    assert launcher.got == [SIGTERM, SIGINT, SIGKILL]
    assert launcher.asks == [
        EndRequest(TIMEOUT, 5000),
        EndRequest(TIMEOUT, 5000),
        EndRequest(TIMEOUT, 0),
    ]


@pytest.mark.parametrize(
    ("cause", "verdict"),
    [
        (STOP, (Event.STOP, None)),
        (TIMEOUT, (Event.FAIL, Reason.TIMEOUT)),
        (OUTPUT, (Event.FAIL, Reason.OUTPUT)),
    ],
)
async def test_end_that_an_earlier_service_asked_for_is_gone_on_with(
    autojump_clock: MockClock, cause: str, verdict: tuple[Event, Reason | None]
) -> None:
    """The same cause, the same deadline, and no signal that the job has got already."""
    launcher = OneJob()
    ending = ending_of(launcher)
    now = time.monotonic()
    asked = EarlierEndRequest(
        cause=cause, first_at=now - 50, kill_at=now + 10, signals=frozenset({SIGINT})
    )
    ending.resume(asked)
    ending.stop(SIGINT, 60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ending.serve)
        await trio.sleep(9)
        assert launcher.got == []
        await trio.sleep(2)
    assert launcher.got == [SIGKILL]
    assert ending.verdict(EXITED) == verdict


async def test_later_stop_by_the_same_signal_is_a_new_one(autojump_clock: MockClock) -> None:
    launcher = OneJob()
    ending = ending_of(launcher)
    now = time.monotonic()
    ending.resume(
        EarlierEndRequest(cause=STOP, first_at=now, kill_at=now + 900, signals=frozenset({SIGINT}))
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ending.serve)
        ending.stop(SIGTERM, 600)
        await trio.sleep(300)
        ending.stop(SIGINT, 600)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert launcher.got == [SIGTERM, SIGINT]
