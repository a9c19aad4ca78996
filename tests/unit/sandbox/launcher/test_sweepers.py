"""What clears away after jobs is collected once, whatever fails around that."""

import os
import select
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox import event_loop as turns_module
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.launcher import jobs as launcher_jobs
from jobworker.sandbox.launcher.children import Nursery
from jobworker.sandbox.launcher.jobs import Jobs
from jobworker.sandbox.launcher.sweepers import Sweepers


def clone(*, ends: bool) -> int:
    """The pidfd of a process that has ended, or of one that goes on."""
    pid, pidfd = sc.clone3(0)
    if pid == 0:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        if not ends:
            signal.pause()
        os._exit(0)
    if ends:
        select.select([pidfd], [], [])
    return pidfd


def jobs_with(sweepers: Sweepers) -> Jobs:
    """As much of the launcher's jobs as looks after sweepers."""
    jobs = Jobs.__new__(Jobs)
    jobs._turns = Turns()
    jobs._nursery = cast("Nursery", SimpleNamespace(sweepers=sweepers))
    return jobs


def test_sweeper_is_collected_once_also_where_what_follows_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns_module, "AGAIN_SECONDS", 0)
    sweepers, others = Sweepers(), list[int]()
    jobs, counted = jobs_with(sweepers), list[bool]()

    def fail_once() -> int:
        counted.append(True)
        if len(counted) == 1:
            others.append(clone(ends=False))
            raise KeyError("unforeseen")
        return 0

    monkeypatch.setattr(sweepers, "count_kept", fail_once)
    ended = clone(ends=True)
    sweepers.running.add(ended)
    jobs._watch_sweepers()
    while len(counted) < 2:  # it waits for no other process
        jobs._turns.turn()
    assert others == [ended], "the number is another process's now, such as a job's"
    signal.pidfd_send_signal(ended, signal.SIGKILL)
    assert os.waitid(os.P_PIDFD, ended, os.WEXITED) is not None, (
        "it was neither collected nor closed"
    )
    os.close(ended)


def test_sweeper_that_a_tracer_has_is_collected_later(
    traced: tuple[int, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher_jobs, "SWEEP_AGAIN_SECONDS", 0)
    sweepers, (pidfd, let_go) = Sweepers(), traced
    jobs = jobs_with(sweepers)
    sweepers.running.add(pidfd)
    jobs._watch_sweepers()
    for _ in range(3):
        jobs._turns.turn()
    assert sweepers.running == {pidfd}
    let_go()
    while sweepers.running:
        jobs._turns.turn()


def test_disk_counts_as_kept_where_nothing_tells() -> None:
    nothing = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)  # flock(2) refuses it
    assert disk_images.is_attached(nothing)
    os.close(nothing)
