"""What a process that looks at a job tells the launcher, also if it dies over it."""

import os
import signal
from functools import partial

import pytest

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import MOST_SECONDS, Chores
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.kernel_memory.measure import Measurement
from jobworker.sandbox.kernel_memory.search import SearchResult
from jobworker.sandbox.launcher.kernel_looks import LookedAt, in_its_own_proc, used_by

from ....descriptors import descriptors


def run(event_loop: EventLoop, forks: ForkServer, work: partial[Message], *holding: int) -> Message:
    """The outcome of work in a process of its own."""
    outcomes = list[Message]()
    Chores(event_loop, forks, at_once=1, waiting=0).start(work, outcomes.append, holding)
    while not outcomes:
        event_loop.run_once()
    return outcomes[0]


def look_and_die(looked_at: LookedAt) -> Message:
    looked_at.tell(7)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_job_that_a_process_dies_over_is_known(event_loop: EventLoop, forks: ForkServer) -> None:
    before = len(descriptors())
    looked_at = LookedAt()
    assert looked_at.job == 0
    outcome = run(event_loop, forks, partial(look_and_die, looked_at), looked_at.memory)
    assert "errno" in outcome
    assert [looked_at.job, looked_at.job] == [7, 7]
    looked_at.tell(0)
    assert looked_at.job == 0
    looked_at.close()
    assert len(descriptors()) == before


def measure() -> Measurement:
    return Measurement({3: 4}, {"netlink": 5}, frozenset({6}), {7: 8}, {9: 10})


def test_measurement_comes_as_lists_with_the_time_that_it_took(
    event_loop: EventLoop, forks: ForkServer
) -> None:
    outcome = run(event_loop, forks, partial(in_its_own_proc, measure))
    used = outcome.pop("used_seconds")
    assert isinstance(used, float)
    assert used > 0
    assert outcome == {
        "held": [[3, 4]],
        "unknown": [["netlink", 5]],
        "unfinished": [6],
        "in_sockets": [[7, 8]],
        "orphans": [[9, 10]],
    }


def search() -> SearchResult:
    mounts = os.stat("/proc/self/ns/mnt").st_ino
    return SearchResult(locks=mounts, netlink=os.stat("/proc").st_dev, is_all=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a /proc")
def test_search_looks_into_a_proc_of_its_own(event_loop: EventLoop, forks: ForkServer) -> None:
    """The kernel keeps what was looked up there, and the launcher's has to stay small."""
    outcome = run(event_loop, forks, partial(in_its_own_proc, search))
    assert outcome["is_all"] is False
    assert outcome["locks"] != os.stat("/proc/self/ns/mnt").st_ino
    assert outcome["netlink"] != os.stat("/proc").st_dev


def refuse(_: int) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_search_is_made_where_a_proc_may_not_be_mounted(
    event_loop: EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sc, "unshare", refuse)
    forks = ForkServer(event_loop, {})
    outcome = run(event_loop, forks, partial(in_its_own_proc, search))
    forks.close()
    assert outcome["netlink"] == os.stat("/proc").st_dev


def test_process_without_an_outcome_has_used_all_that_it_may() -> None:
    assert used_by({"used_seconds": 0.25}) == 0.25
    assert used_by({"errno": 4}) == MOST_SECONDS
