"""Which jobs are searched for uncounted kernel memory and when, and what becomes of the outcome."""

import errno
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import CROWDED, Chores
from jobworker.sandbox.kernel_memory.cpu_budget import LONGEST_REST_SECONDS
from jobworker.sandbox.kernel_memory.measure import BOUND_BYTES
from jobworker.sandbox.kernel_memory.search import SearchResult
from jobworker.sandbox.launcher import kernel_searches
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.kernel_searches import Searches
from jobworker.sandbox.launcher.kernel_verdicts import AGAIN_SECONDS, DOUBTS, Verdicts

MUCH = BOUND_BYTES + 1
LIMIT = 1 << 30


def found(used_seconds: float = 0.0, **what: int) -> Message:
    return {**SearchResult()._asdict(), **what, "used_seconds": used_seconds}


class Searched:
    """Searches of two jobs, by ids 1 and 2, whose processes the test plays."""

    def __init__(self) -> None:
        self.now, self.refuses = 1000.0, 0
        self.under_way: list[tuple[Any, Callable[[Message], None]]] = []
        self.jobs = {number: self._job(number) for number in (1, 2)}
        self.killed: list[Child] = []
        self.measured_again = 0
        verdicts = Verdicts(lambda: self.jobs, self.killed.append)
        chores = cast("Chores", SimpleNamespace(start=self._start_chore))
        self.searches = Searches(chores, lambda: self.jobs, verdicts, self._measure_again)

    def _job(self, number: int) -> Child:
        scope = SimpleNamespace(sockets_limit_bytes=LIMIT, sockets_counted=lambda: (0, 0))
        return cast(
            "Child", SimpleNamespace(job=number, pid=10 + number, hoards=False, scope=scope)
        )

    def _start_chore(self, work: partial[Message], done: Callable[[Message], None]) -> None:
        if self.refuses:
            raise OSError(self.refuses, os.strerror(self.refuses))
        self.under_way.append((work.args[0], done))

    def _measure_again(self) -> None:
        self.measured_again += 1

    def want(self, job: int, *, sockets_too: bool = False, doubts: bool = False) -> None:
        self.searches.want(job, sockets_too=sockets_too, doubts=doubts)

    def start(self, *unknown: dict[str, int]) -> list[int]:
        """Start what is due, and return the pids that processes look at now."""
        self.searches.start(self.jobs, list(unknown))
        return [search.args[0] for search, _ in self.under_way]

    def search(self, outcome: Message) -> None:
        """Have the job 1 searched, with this outcome."""
        assert self.start() == [11]
        self.end(outcome)

    def end(self, outcome: Message) -> None:
        """End the oldest search."""
        _, done = self.under_way.pop(0)
        done(outcome)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> Searched:
    made = Searched()
    monkeypatch.setattr(kernel_searches, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(kernel_searches, "log_line", lambda _: None)
    return made


def test_job_is_searched_once_for_all_reasons_that_came_before(searched: Searched) -> None:
    searched.want(1, sockets_too=True)
    searched.want(1, doubts=True)
    assert searched.start({"netlink": 5}, {"00:01:7": 6}) == [11]
    (search, _) = searched.under_way[0]
    assert dict(search.args[1]) == {"netlink": 5, "00:01:7": 6}
    assert search.keywords == {"sockets_too": True, "enough_bytes": LIMIT + 2 * BOUND_BYTES}
    searched.end(found(in_flight=1))
    assert searched.start() == []


def test_search_that_is_wanted_during_a_search_follows_it(searched: Searched) -> None:
    searched.want(1)
    searched.start()
    searched.want(1, sockets_too=True)
    assert searched.start() == [11], "one at a time"
    searched.end(found())
    assert searched.start() == [11]
    assert searched.under_way[0][0].keywords["sockets_too"]


def test_job_that_ends_before_its_search_is_not_searched(searched: Searched) -> None:
    searched.want(1)
    searched.want(2)
    del searched.jobs[1]
    assert searched.start() == [12]
    searched.jobs[1] = searched.jobs[2]
    assert searched.start() == [12], "it is not wanted any more"


def test_job_that_ends_during_its_search_is_not_judged(searched: Searched) -> None:
    searched.want(1)
    searched.start()
    del searched.jobs[1]
    searched.end(found(locks=MUCH))
    assert not searched.killed


def test_search_that_used_much_of_a_processor_delays_the_next(searched: Searched) -> None:
    searched.want(1)
    searched.search(found(used_seconds=50.0))
    searched.want(1)
    searched.want(2)
    assert searched.start() == [12], "each job has a pace of its own"
    searched.now += LONGEST_REST_SECONDS + 0.001
    assert searched.start() == [12, 11]


def test_pace_of_a_job_that_has_ended_is_dropped(searched: Searched) -> None:
    searched.want(1)
    searched.search(found(used_seconds=50.0, most_in_pipes=0))
    searched.searches.forget_all_but([2])
    searched.want(1)
    assert searched.start() == [11]


@pytest.mark.parametrize("kind", ["locks", "netlink"])
def test_job_that_holds_too_much_is_ended(searched: Searched, kind: str) -> None:
    searched.want(1)
    searched.search(found(**{kind: BOUND_BYTES}))
    assert not searched.killed
    searched.want(1)
    searched.search(found(**{kind: MUCH}))
    assert searched.killed == [searched.jobs[1]]


def test_sockets_beyond_what_the_group_counts_end_a_job_and_are_measured_again(
    searched: Searched,
) -> None:
    searched.want(1)
    searched.search(found(in_sockets=MUCH))
    assert searched.killed == [searched.jobs[1]]
    assert searched.measured_again == 1


@pytest.mark.parametrize(
    "unclear", [{"in_flight": 1}, {"in_requests": MUCH}, {"is_all": False}], ids=str
)
def test_unclear_searches_count_only_if_memory_is_nobodys(
    searched: Searched, unclear: dict[str, int]
) -> None:
    for _ in range(2 * DOUBTS):
        searched.want(1)
        searched.search(found(**unclear))
    assert not searched.killed, "the host's memory has grown, which proves nothing"
    for _ in range(DOUBTS):
        searched.want(1, doubts=True)
        searched.want(1)
        searched.search(found(**unclear))
    assert searched.killed == [searched.jobs[1]]


def test_clear_search_ends_the_doubts(searched: Searched) -> None:
    for outcome in ({"in_flight": 1}, {"in_flight": 1}, {}, {"in_flight": 1}):
        searched.want(1, doubts=True)
        searched.search(found(**outcome))
    assert not searched.killed


def test_pipes_beyond_the_memory_limit_end_a_job(searched: Searched) -> None:
    searched.want(1, sockets_too=True)
    searched.search(found(in_pipes=LIMIT + BOUND_BYTES))
    assert not searched.killed
    searched.want(1)
    searched.search(found(in_pipes=LIMIT + MUCH))
    assert not searched.killed, "this search did not look at pipes"
    searched.want(1, sockets_too=True)
    searched.search(found(in_pipes=LIMIT + MUCH))
    assert searched.killed == [searched.jobs[1]]


def test_job_whose_pipes_may_hold_much_is_searched_again_after_a_while(searched: Searched) -> None:
    much = found(most_in_pipes=LIMIT + 2 * BOUND_BYTES + 1)
    searched.want(1, sockets_too=True)
    for number in range(DOUBTS):
        assert not searched.killed
        searched.search(much)
        if number + 1 < DOUBTS:
            assert searched.start() == []
            searched.now += AGAIN_SECONDS
    assert searched.killed == [searched.jobs[1]]


def test_search_that_finds_little_in_pipes_is_the_last(searched: Searched) -> None:
    searched.want(1, sockets_too=True)
    for more in (1, 0):
        searched.search(found(most_in_pipes=LIMIT + 2 * BOUND_BYTES + more))
        searched.now += AGAIN_SECONDS
    assert searched.start() == []


def test_second_search_of_pipes_is_dropped_with_its_job(searched: Searched) -> None:
    searched.want(1, sockets_too=True)
    searched.search(found(most_in_pipes=LIMIT + 2 * BOUND_BYTES + 1))
    searched.searches.forget_all_but([2])
    searched.now += AGAIN_SECONDS
    assert searched.start() == []


def test_search_that_failed_is_made_again_for_the_same_reasons(searched: Searched) -> None:
    searched.want(1, sockets_too=True, doubts=True)
    for number in range(DOUBTS):
        assert not searched.killed
        searched.search({"errno": errno.EINTR, "detail": "", "used_seconds": 0.0})
        if number + 1 < DOUBTS:
            assert searched.start() == [11]
            assert searched.under_way[0][0].keywords["sockets_too"]
    assert searched.killed == [searched.jobs[1]]


def test_search_that_succeeds_excuses_those_that_failed(searched: Searched) -> None:
    failed: Message = {"errno": errno.EINTR, "detail": "", "used_seconds": 0.0}
    searched.want(1)
    for outcome in (failed, failed, found(), failed, failed):
        searched.want(1)
        searched.search(outcome)
    assert not searched.killed


def test_search_that_did_not_begin_counts_for_nothing(searched: Searched) -> None:
    searched.want(1)
    for _ in range(2 * DOUBTS):
        searched.search({"errno": errno.EINTR, "detail": "", "begun": False})
    assert not searched.killed
    assert searched.start() == [11], "at once, since it has used nothing"


def test_search_for_which_no_process_can_be_made_waits(searched: Searched) -> None:
    searched.refuses = errno.EMFILE
    searched.want(1)
    for _ in range(2 * DOUBTS):
        assert searched.start() == []
    searched.refuses = 0
    assert searched.start() == [11]
    assert not searched.killed


def test_job_that_others_keep_from_being_searched_is_ended(searched: Searched) -> None:
    searched.refuses = CROWDED
    searched.want(1)
    for _ in range(DOUBTS):
        assert not searched.killed
        searched.now += 600
        searched.start()
    assert searched.killed == [searched.jobs[1]]
