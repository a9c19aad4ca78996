"""How the launcher's reports become the service's data: durations become times."""

import time
from types import SimpleNamespace

import pytest

from jobworker.model.job import Usage
from jobworker.sandbox.cgroup.accounting import ScopeUsage
from jobworker.sandbox.protocol.end_requests import EndRequestReport
from jobworker.sandbox.protocol.events import JobEnded
from jobworker.sandbox.protocol.replies import HowEnded, JobEntry
from jobworker.sandbox.service import job_reports
from jobworker.sandbox.service.job_reports import exit_from, kept_job_from, usage_from

USED = ScopeUsage(1, 2, 3, 4, 5, 6, 7, 8)
HOW = HowEnded(None, 9, ("", "data"), ("more",), "host")
ENTRY = JobEntry(3, 20, 50.0, 30.0, None, USED, True, "", None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The host's monotonic clock, in `now`."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(job_reports, "time", clock)
    return clock


def test_usage_has_every_counter_of_the_control_groups() -> None:
    assert usage_from(USED) == Usage(
        cpu_ns=1,
        memory_bytes=2,
        memory_peak_bytes=3,
        read_bytes=4,
        write_bytes=5,
        processes=6,
        throttled_ns=7,
        oom_kills=8,
    )


def test_end_stays_where_it_is_however_late_it_is_read(clock: SimpleNamespace) -> None:
    ended = exit_from(JobEnded(3, 30.0, HOW, USED, measured=True))
    assert ended.ended_at == 970.0
    clock.now += 100
    assert ended.seconds_ago == 130.0
    assert (ended.code, ended.signal) == (None, 9)
    assert (ended.lost, ended.unseen, ended.want) == (("", "data"), ("more",), "host")
    assert ended.usage == usage_from(USED)


def test_usage_that_could_not_be_read_is_none() -> None:
    assert exit_from(JobEnded(3, 0.0, HOW, ScopeUsage(), measured=False)).usage is None


@pytest.mark.parametrize(
    ("told", "kills", "want"),
    [
        ("", 1, ""),
        ("host", 0, "host"),
        ("kernel", 0, "kernel"),
        ("limit", 1, "limit"),
        ("limit", 0, ""),
        (None, 1, "limit"),
        (None, 0, ""),
        ("of a later launcher", 1, "limit"),
    ],
)
def test_memory_that_was_short_is_what_the_launcher_says_or_the_jobs_own(
    told: str | None, kills: int, want: str
) -> None:
    how = HOW._replace(want=told)
    assert exit_from(JobEnded(3, 0.0, how, ScopeUsage(oom_kills=kills), True)).want == want


def test_job_that_lives_is_kept_without_an_end(clock: SimpleNamespace) -> None:
    kept = kept_job_from(ENTRY, 7, 8)
    assert (kept.job, kept.pid, kept.stdout, kept.stderr) == (3, 20, 7, 8)
    assert kept.since == 950.0
    assert kept.exit is None
    assert kept.asked is None


def test_job_that_has_ended_is_kept_with_its_end(clock: SimpleNamespace) -> None:
    kept = kept_job_from(ENTRY._replace(exit=HOW, network_end="it broke"), 7, 8)
    assert kept.exit == exit_from(JobEnded(3, 30.0, HOW, USED, measured=True))
    assert kept.exit.ended_at == 970.0
    assert kept.network_end == "it broke"


def test_deadline_of_an_earlier_service_is_kept(clock: SimpleNamespace) -> None:
    report = EndRequestReport("stop", 5.0, 2.0, (15, 2))
    asked = kept_job_from(ENTRY._replace(asked=report), 7, 8).asked
    assert asked is not None
    assert asked.cause == "stop"
    assert asked.signals == {15, 2}
    assert (asked.seconds_ago, asked.kill_in_seconds) == (5.0, 2.0)
    clock.now += 10
    assert (asked.seconds_ago, asked.kill_in_seconds) == (15.0, -8.0), "it is overdue"


def test_clock_is_the_one_that_is_never_set_back() -> None:
    before = time.monotonic()
    ended = exit_from(JobEnded(3, 0.0, HOW, USED, measured=True))
    assert before <= ended.ended_at <= time.monotonic()
