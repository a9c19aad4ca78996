"""Each end and notice reaches the execution of its own job, and no channel stays open."""

import pytest
import trio

from jobworker.model.job import JobId
from jobworker.sandbox.cgroup.accounting import ScopeUsage
from jobworker.sandbox.protocol.events import JobEnded, NetworkEnded
from jobworker.sandbox.protocol.replies import HowEnded
from jobworker.sandbox.service.job_ends import NOTICES_KEPT, Exits, JobEnds, Notices
from jobworker.sandbox.service.job_reports import JobExit, KeptJob

ONE, TWO = JobId(1), JobId(2)
KEPT = KeptJob(job=ONE, pid=20, since=5.0, exit=None, stdout=7, stderr=8)
EXIT = JobExit(code=0, signal=None, usage=None)


def ended(job: JobId, code: int = 0) -> JobEnded:
    return JobEnded(job, 0.0, HowEnded(code, None, (), (), ""), ScopeUsage(), measured=True)


def closed(channel: Exits | Notices) -> bool:
    """Whether nothing is left in a channel and nothing will come."""
    try:
        channel.receive_nowait()
    except trio.EndOfChannel:
        return True
    except trio.WouldBlock:
        return False
    return False


async def test_end_reaches_its_own_job_and_closes_its_channels() -> None:
    ends = JobEnds()
    (one, notices), (two, _) = ends.expect(ONE), ends.expect(TWO)
    ends.on_event(ended(ONE, code=3))
    assert one.receive_nowait().code == 3
    assert closed(one)
    assert closed(notices)
    assert not closed(two)
    ends.on_event(ended(TWO, code=4))
    assert two.receive_nowait().code == 4


async def test_notice_reaches_its_own_job_before_its_end() -> None:
    ends = JobEnds()
    (_, notices), (_, other) = ends.expect(ONE), ends.expect(TWO)
    ends.on_event(NetworkEnded(ONE, "it died"))
    ends.on_event(ended(ONE))
    assert notices.receive_nowait() == "its private network ended: it died"
    assert closed(notices)
    assert not closed(other)


async def test_events_of_unknown_jobs_are_dropped() -> None:
    ends = JobEnds()
    ends.on_event(ended(ONE))
    ends.on_event(NetworkEnded(ONE, "it died"))
    exits, notices = ends.expect(ONE)
    for code in (3, 4):
        ends.on_event(ended(ONE, code))
    assert [ending.code async for ending in exits] == [3], "after its end it is unknown"
    assert closed(notices)


async def test_notices_that_nobody_reads_are_dropped() -> None:
    ends = JobEnds()
    _, notices = ends.expect(ONE)
    for number in range(NOTICES_KEPT + 5):
        ends.on_event(NetworkEnded(ONE, str(number)))
    ends.expect_no_more(ONE)
    assert [notice async for notice in notices] == [
        f"its private network ended: {number}" for number in range(NOTICES_KEPT)
    ]


async def test_execution_that_has_gone_disturbs_nobody() -> None:
    ends = JobEnds()
    exits, notices = ends.expect(ONE)
    exits.close()
    notices.close()
    ends.on_event(NetworkEnded(ONE, "it died"))
    ends.on_event(ended(ONE))


@pytest.mark.parametrize("job", [ONE, TWO])
async def test_start_that_failed_closes_the_channels_of_its_job(job: JobId) -> None:
    ends = JobEnds()
    channels = ends.expect(ONE)
    ends.expect_no_more(job)
    for channel in channels:
        assert closed(channel) == (job == ONE)


async def test_job_that_the_launcher_has_kept_is_as_it_was_listed() -> None:
    ends = JobEnds()
    started, exits = ends.inherit(KEPT)
    assert (started.pid, started.stdout, started.stderr, started.since) == (20, 7, 8, 5.0)
    assert started.asked is None
    assert not closed(started.notices)
    ends.on_event(ended(ONE))
    assert exits.receive_nowait().code == 0
    assert closed(started.notices)


async def test_job_that_ended_between_services_has_its_end_at_once() -> None:
    listed = KeptJob(
        job=ONE, pid=20, since=5.0, exit=EXIT, stdout=7, stderr=8, network_end="it broke"
    )
    started, exits = JobEnds().inherit(listed)
    assert started.notices.receive_nowait() == "its private network ended: it broke"
    assert exits.receive_nowait() is EXIT
    assert closed(exits)
    assert closed(started.notices)


async def test_end_of_the_launcher_closes_all_channels() -> None:
    ends = JobEnds()
    channels = [ends.expect(ONE), ends.expect(TWO)]
    ends.close()
    assert all(closed(channel) for pair in channels for channel in pair)
