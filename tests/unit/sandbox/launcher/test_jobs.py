"""The launcher's children: who is a job, and who is told when nothing of one is left."""

from functools import partial

import pytest

from jobworker.sandbox import event_loop as event_loop_module
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits
from jobworker.sandbox.launcher import jobs as jobs_module
from jobworker.sandbox.launcher.child import Child, ChildExit, PendingStart
from jobworker.sandbox.launcher.jobs import Jobs
from jobworker.sandbox.protocol.requests import Spawn
from jobworker.sandbox.start import trampoline
from jobworker.sandbox.start.plan import Order

from .conftest import QuietPool, StartChild, new_child, pass_turns_until

NO_IMAGE = trampoline.ExecImage(b"", "", "", ())


def start_of(job: int, number: int = 7) -> PendingStart:
    request = Spawn(job, Order("host", ("true",), {}, "/"), ScopeLimits())
    return PendingStart(number, request, NO_IMAGE, 60)


@pytest.fixture
def jobs(pool: QuietPool) -> Jobs:
    return Jobs(pool.given)


def job(jobs: Jobs, number: int, child: Child | None = None) -> Child:
    """A child that is this job, and whose program runs."""
    child = child or new_child(number)
    jobs.add(child)
    jobs.become(child, start_of(number))
    child.request = None
    return child


def test_starts_are_found_and_are_not_among_the_started(jobs: Jobs) -> None:
    later, earlier, starting = (job(jobs, number) for number in (3, 2, 4))
    jobs.become(starting, start_of(4))
    assert jobs.find(4) is starting
    assert jobs.started_after(0) == [earlier, later]
    assert jobs.started_after(2) == [later]
    assert jobs.count == 3


def test_only_jobs_with_a_living_process_run(jobs: Jobs, start_child: StartChild) -> None:
    running = job(jobs, 1, start_child())
    job(jobs, 2)  # it has no process yet
    job(jobs, 3, start_child()).exit = ChildExit(0, None)
    assert jobs.running() == {1: running}


def test_only_the_latest_starts_are_remembered(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "UNSTARTED_KEPT", 2)
    for number in (1, 2, 1, 3):
        jobs.remember_unstarted(number)
    assert jobs.unstarted == [1, 3]
    jobs.forget_unstarted(1)
    assert jobs.unstarted == [3]


def test_removal_of_a_job_that_is_cleared_is_answered_at_once(jobs: Jobs) -> None:
    child, told = job(jobs, 1), list[str]()
    child.exit = ChildExit(0, None)
    jobs.discard(child)
    jobs.tell_cleared(child)
    assert jobs.find(1) is child, "its exit status is kept"
    jobs.remove(child, partial(told.append, "free"))
    assert jobs.find(1) is None
    assert told == ["free"]


def test_removal_of_an_ended_job_is_answered_when_its_slot_is_free(jobs: Jobs) -> None:
    child, told = job(jobs, 1), list[str]()
    child.exit = ChildExit(0, None)
    jobs.remove(child, partial(told.append, "free"))
    assert not told
    jobs.discard(child)
    jobs.tell_cleared(child)
    assert told == ["free"]


def test_removal_of_a_running_job_kills_it_and_is_answered_when_its_slot_is_free(
    jobs: Jobs, start_child: StartChild
) -> None:
    child, told = job(jobs, 1, start_child()), list[str]()
    jobs.remove(child, partial(told.append, "free"))
    assert child.doomed
    assert jobs.find(1) is None
    assert not told
    jobs.discard(child)
    jobs.tell_cleared(child)
    assert told == ["free"]
    assert jobs.nothing_left


def test_word_that_a_place_is_free_is_said_again_where_that_failed(
    jobs: Jobs, pool: QuietPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_loop_module, "AGAIN_SECONDS", 0)
    child, said = job(jobs, 1), list[str]()

    def fail_once() -> None:
        said.append("free")
        if len(said) == 1:
            raise KeyError("unforeseen")

    child.when_cleared = fail_once
    jobs.discard(child)
    pool.event_loop.call_with_retries(partial(jobs.tell_cleared, child))
    pass_turns_until(pool.event_loop, lambda: child.when_cleared is None)
    assert len(said) == 2


def test_word_that_could_not_be_said_is_not_for_the_next_service(
    jobs: Jobs, pool: QuietPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_loop_module, "AGAIN_SECONDS", 0)
    child, said = job(jobs, 1), list[str]()

    def fail() -> None:
        said.append("free")
        raise KeyError("unforeseen")

    child.request, child.when_cleared = 7, fail
    jobs.discard(child)
    pool.event_loop.call_with_retries(partial(jobs.tell_cleared, child))
    jobs.forget_listeners()
    done = list[bool]()
    pool.event_loop.call_later(0.01, lambda: done.append(True))
    pass_turns_until(pool.event_loop, lambda: done)
    assert len(said) == 1
    assert child.request is None
