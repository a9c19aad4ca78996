"""How the launcher words the state of a job, and why it refuses a request."""

import errno
import os
import time

from jobworker.errors import SandboxError
from jobworker.sandbox.cgroup.accounting import ScopeUsage
from jobworker.sandbox.launcher.child import ChildExit
from jobworker.sandbox.launcher.reports import (
    fault,
    how_ended,
    job_entry,
    measured,
    problem,
    since_end,
    too_long,
)
from jobworker.sandbox.protocol.end_requests import EndRequest, EndRequestLog
from jobworker.sandbox.protocol.replies import HowEnded
from jobworker.sandbox.service.job_reports import kept_job_from

from .conftest import StartChild


def test_live_job_is_listed_without_an_end(start_child: StartChild) -> None:
    child = start_child()
    child.job, child.started_at, child.network_end = 7, time.monotonic() - 50, "it broke"
    child.exit = ChildExit(0, None)
    entry = job_entry(child)
    assert (entry.job, entry.pid, entry.network_end) == (7, child.pid, "it broke")
    assert 50 <= entry.age_seconds < 50 + 120
    assert entry.exit is None, "its volumes are still written out"
    assert entry.asked is None


def test_ended_job_is_listed_with_its_end_and_what_was_asked(start_child: StartChild) -> None:
    child, now = start_child(), time.monotonic()
    child.job, child.exit, child.end_is_known = 7, ChildExit(None, 9), True
    child.ended_at, child.asked = now - 30, EndRequestLog(EndRequest("stop", 0), now)
    child.lost, child.unseen, child.final_want = ["", "data"], ["more"], "host"
    entry = job_entry(child)
    assert entry.exit == HowEnded(None, 9, ("", "data"), ("more",), "host") == how_ended(child)
    assert 30 <= entry.ended_seconds_ago < 30 + 120
    assert entry.asked is not None
    assert entry.asked.cause == "stop"
    assert since_end(child) >= entry.ended_seconds_ago


def test_usage_that_cannot_be_read_is_none_for_the_service_and_not_zeros(
    start_child: StartChild,
) -> None:
    child = start_child()
    child.job, child.exit, child.end_is_known = 7, ChildExit(0, None), True
    child.final_usage = ScopeUsage(cpu_ns=5)
    assert measured(child) == (ScopeUsage(cpu_ns=5), True)
    child.final_usage = None
    own, child.pidfd = child.pidfd, -1
    assert measured(child) == (ScopeUsage(), False), "an earlier service knows numbers only"
    ended = kept_job_from(job_entry(child), -1, -1).exit
    child.pidfd = own
    assert ended is not None
    assert ended.usage is None


def test_error_of_the_kernel_is_refused_with_its_errno_and_the_callers_step() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data")
    assert problem("spawn", error) == {
        "step": "spawn",
        "errno": errno.ENOSPC,
        "detail": "[Errno 28] No space left on device: '/data'",
    }
    assert problem("spawn", OSError("no number"))["errno"] == 0


def test_error_that_names_its_step_is_refused_with_that() -> None:
    data = {"step": "disk", "errno": errno.EDQUOT, "detail": "full"}
    assert problem("spawn", SandboxError("cannot", data=data)) == data
    assert problem("spawn", SandboxError("cannot")) == {
        "step": "limits",
        "errno": 0,
        "detail": "cannot",
    }


def test_unexpected_fault_tells_its_incident_and_nothing_else() -> None:
    told = fault("c0ffee")
    assert str(told["detail"]).endswith("incident c0ffee")
    assert (told["step"], told["errno"]) == ("launcher", 0)


def test_start_that_took_too_long_says_what_was_not_done_in_which_time() -> None:
    assert too_long("its sandbox was not made", 30.0) == {
        "step": "start",
        "errno": errno.ETIMEDOUT,
        "detail": "its sandbox was not made within 30 s",
    }
