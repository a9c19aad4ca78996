"""Whom the watch over kernel memory ends, by what is measured and found."""

import errno
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import pytest

from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import CROWDED, UNENDING, Chores
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.kernel_memory.cpu_budget import LONGEST_REST_SECONDS
from jobworker.sandbox.kernel_memory.measure import BOUND_BYTES
from jobworker.sandbox.launcher import (
    kernel_looks,
    kernel_searches,
    kernel_verdicts,
    kernel_watch,
)
from jobworker.sandbox.launcher.child import Child

MUCH = BOUND_BYTES + 1
LIMIT = 1 << 30
NONE: dict[str, object] = {
    "held": [],
    "unknown": [],
    "unfinished": [],
    "in_sockets": [],
    "orphans": [],
    "used_seconds": 0.0,
}
UNKNOWN = {**NONE, "unknown": [["00:01:7", MUCH]]}
FOUND: dict[str, object] = {
    "locks": 0,
    "netlink": 0,
    "in_flight": 0,
    "is_all": True,
    "in_sockets": 0,
    "in_requests": 0,
    "in_pipes": 0,
    "most_in_pipes": 0,
    "used_seconds": 0.0,
}


class Host:
    """The host's figures, as the test sets them."""

    slabs = tcp = other = 0
    fails = False

    def unreclaimable(self) -> int:
        return self._tell(self.slabs)

    def in_tcp(self) -> int:
        return self._tell(self.tcp)

    def unnamed(self) -> int:
        return self._tell(self.other)

    def _tell(self, figure: int) -> int:
        if self.fails:
            raise OSError(errno.ENOMEM, "the kernel has no memory to tell")
        return figure


class Processes:
    """Chores that are done when the test says so."""

    def __init__(self, _turns: EventLoop, _forks: ForkServer, **_bounds: int) -> None:
        self.dones: list[Callable[[dict[str, object]], None]] = []
        self.works: list[Any] = []
        self.refuses = 0
        """With what errno none is started."""

    def start(
        self, work: object, done: Callable[[Any], None], _holding: Sequence[int] = ()
    ) -> None:
        if self.refuses:
            raise OSError(self.refuses, os.strerror(self.refuses))
        self.works.append(work)
        self.dones.append(done)

    def finish(self, *outcomes: dict[str, object]) -> None:
        dones, self.dones = self.dones, []
        assert len(dones) == len(outcomes)
        for done, outcome in zip(dones, outcomes, strict=True):
            done(outcome)


def child_of(number: int, scope: SimpleNamespace) -> Child:
    return cast("Child", SimpleNamespace(job=number, pid=10 + number, hoards=False, scope=scope))


class Watched:
    """A watch over two jobs, by ids 1 and 2, whose looks the test takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_watch, "Chores", Processes)
        self.host = Host()
        monkeypatch.setattr(kernel_watch, "HostMemory", lambda: self.host)
        self.now = self.used = 0.0
        """The time, and what this thread has used of a processor."""
        clock = SimpleNamespace(monotonic=lambda: self.now, thread_time=lambda: self.used)
        for module in (kernel_watch, kernel_searches):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(kernel_watch, "AGAIN_SECONDS", -1)
        self.in_sockets = {1: 0, 2: 0}
        self.counted: dict[int, tuple[int, int]] = {}
        """What a job's group counts in sockets: now, and at most since that was read."""
        self.jobs = {n: self._job(n) for n in self.in_sockets}
        self.ended: list[Child] = []
        self.asked = 0
        """How often the watch has asked which jobs run, for which all of them are looked at."""
        self.watch = kernel_watch.KernelWatch(
            EventLoop(), cast("ForkServer", None), 4, self._running, self.ended.append, locks=-1
        )
        self.watch.wake()
        self.measurers = cast("Processes", self.watch._measurers)
        self.searchers = cast("Processes", self.watch._searchers)

    def _running(self) -> dict[int, Child]:
        self.asked += 1
        return self.jobs

    def _job(self, number: int) -> Child:
        def counted() -> tuple[int, int]:
            now, most = self.counted.get(number, (0, 0))
            self.counted[number] = (now, now)
            return most, now

        scope = SimpleNamespace(
            sockets_beyond_limit=lambda: self.in_sockets[number],
            sockets_counted=counted,
            sockets_limit_bytes=LIMIT,
        )
        return child_of(number, scope)

    def grow(self) -> None:
        """Have slabs grow, and the host's other memory shrink: nothing is hidden."""
        self.host.slabs += kernel_watch.STEP_BYTES + 1
        self.host.other -= kernel_watch.STEP_BYTES + 1
        self.watch._look()

    def search(self, *outcomes: dict[str, object]) -> None:
        """Have it measured that much is nobody's, and each job searched."""
        self.grow()
        measures = len(self.measurers.dones)
        self.measurers.finish(*[UNKNOWN, *[NONE] * (measures - 1)])
        self.searchers.finish(*outcomes)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_nothing_is_measured_without_a_reason(watched: Watched) -> None:
    watched.watch._look()
    assert watched.measurers.dones == []


def test_figure_that_cannot_be_read_has_not_grown(watched: Watched) -> None:
    watched.host.fails = True
    watched.host.slabs += kernel_watch.STEP_BYTES + 1
    watched.watch._look()
    assert watched.measurers.dones == []
    watched.host.fails = False
    watched.watch._look()
    assert len(watched.measurers.dones) == 3, "it has not been forgotten"


def test_watch_begins_though_nothing_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "fails", True)
    monkeypatch.setattr(Host, "slabs", kernel_watch.STEP_BYTES + 1)
    watched = Watched(monkeypatch)
    watched.host.fails = False
    watched.watch._look()
    assert watched.measurers.dones == [], "what was there before is no growth"
    watched.grow()
    assert len(watched.measurers.dones) == 3


def test_job_that_holds_too_much_is_ended(watched: Watched) -> None:
    watched.grow()
    watched.measurers.finish({**NONE, "held": [[1, MUCH - 1], [2, MUCH]]}, NONE, NONE)
    assert watched.ended == [watched.jobs[2]]
    assert watched.jobs[2].hoards
    assert watched.searchers.dones == []


def test_measurement_that_takes_long_delays_no_other(watched: Watched) -> None:
    watched.grow()
    one, slow, other = watched.measurers.dones
    other(NONE)
    watched.measurers.dones = []
    one(NONE)
    watched.grow()
    again, other = watched.measurers.dones
    other(NONE)
    again({**NONE, "held": [[1, MUCH]]})
    assert watched.ended == [watched.jobs[1]]
    watched.measurers.dones = []
    slow(NONE)
    watched.watch._look()
    assert len(watched.measurers.dones) == 1, "what grew meanwhile is still to be measured"


def test_search_that_takes_long_delays_no_other(watched: Watched) -> None:
    watched.grow()
    watched.measurers.finish(UNKNOWN, NONE, NONE)
    _slow, other = watched.searchers.dones
    watched.searchers.dones = []
    other(FOUND)
    watched.grow()
    watched.measurers.finish(UNKNOWN, NONE, NONE)
    watched.searchers.finish({**FOUND, "locks": MUCH})
    assert watched.ended == [watched.jobs[2]]


@pytest.mark.parametrize("doubt", [{"in_flight": 1}, {"is_all": False}, {"in_requests": MUCH}])
def test_job_of_which_searches_cannot_tell_is_ended(
    watched: Watched, doubt: dict[str, object]
) -> None:
    for _ in range(kernel_verdicts.DOUBTS - 1):
        watched.search({**FOUND, **doubt}, FOUND)
    watched.search(FOUND, FOUND)
    for _ in range(kernel_verdicts.DOUBTS - 1):
        watched.search({**FOUND, **doubt}, FOUND)
    assert watched.ended == [], "not often enough in a row"
    watched.search({**FOUND, **doubt}, FOUND)
    assert watched.ended == [watched.jobs[1]]


def test_job_with_too_many_sockets_to_count_is_ended(watched: Watched) -> None:
    for unfinished in ([1], [], [1], [1]):
        watched.grow()
        watched.measurers.finish({**NONE, "unfinished": unfinished}, NONE, NONE)
        assert watched.ended == []
    watched.grow()
    watched.measurers.finish({**NONE, "unfinished": [1]}, NONE, NONE)
    assert watched.ended == [watched.jobs[1]]


def test_doubts_end_when_all_is_known_again(watched: Watched) -> None:
    for _ in range(3 * kernel_verdicts.DOUBTS):
        watched.search({**FOUND, "in_flight": 1}, FOUND)
        watched.grow()
        watched.measurers.finish(*[NONE] * len(watched.measurers.dones))
    assert watched.ended == []


def test_job_whose_sockets_hold_too_much_beyond_its_limit_is_ended(watched: Watched) -> None:
    watched.in_sockets.update({1: MUCH - 1, 2: MUCH})
    watched.watch._look()
    assert watched.ended == [], "there is no reason to look"
    watched.host.tcp += kernel_watch.STEP_BYTES + 1
    watched.watch._look()
    assert watched.ended == [watched.jobs[2]]
    assert len(watched.measurers.dones) == 1, "what waits to be accepted; nothing else has grown"


def hide(watched: Watched) -> None:
    """Have the host's memory grow by what no list explains, and each job searched."""
    watched.host.other += 2 * MUCH
    watched.watch._look()
    watched.measurers.finish(*[NONE] * len(watched.measurers.dones))


def test_job_whose_pipes_hold_too_much_beyond_its_limit_is_ended(watched: Watched) -> None:
    hide(watched)
    within, beyond = LIMIT + MUCH - 1, LIMIT + MUCH
    watched.searchers.finish({**FOUND, "in_pipes": within}, {**FOUND, "in_pipes": beyond})
    assert watched.ended == [watched.jobs[2]]


def test_job_whose_pipes_may_keep_too_much_is_searched_again_and_ended(watched: Watched) -> None:
    """Nothing else is a reason any more, and nothing is nobody's."""
    unsure = {**FOUND, "most_in_pipes": LIMIT + 2 * BOUND_BYTES + 1}
    hide(watched)
    watched.searchers.finish(unsure, {**FOUND, "most_in_pipes": LIMIT + 2 * BOUND_BYTES})
    for _ in range(kernel_verdicts.DOUBTS - 1):
        assert watched.ended == []
        watched.grow()  # which is a reason to measure, and must not put off the search
        watched.measurers.finish(*[NONE] * len(watched.measurers.dones))
        assert watched.searchers.dones == []
        watched.now += 1.01 * kernel_verdicts.AGAIN_SECONDS
        watched.grow()
        watched.measurers.finish(*[NONE] * len(watched.measurers.dones))
        watched.searchers.finish(unsure)
    assert watched.ended == [watched.jobs[1]]


def test_search_that_finds_little_in_pipes_ends_the_doubt(watched: Watched) -> None:
    unsure = {**FOUND, "most_in_pipes": LIMIT + 2 * BOUND_BYTES + 1}
    for _ in range(kernel_verdicts.DOUBTS):
        hide(watched)
        watched.searchers.finish(unsure, FOUND)
        hide(watched)
        watched.searchers.finish(FOUND, FOUND)
    assert watched.ended == []


def test_search_for_what_is_nobodys_tells_nothing_of_pipes(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_watch, "AGAIN_SECONDS", 60)
    hide(watched)
    watched.searchers.finish({**FOUND, "most_in_pipes": LIMIT + 2 * BOUND_BYTES + 1}, FOUND)
    watched.search(FOUND, FOUND)
    assert watched.watch._verdicts._doubts == {(1, kernel_verdicts.PIPES): 1}


def test_many_jobs_are_looked_at_some_in_a_turn(watched: Watched) -> None:
    looked = list[int]()

    def job(number: int) -> Child:
        def beyond() -> int:
            looked.append(number)
            return MUCH

        scope = SimpleNamespace(sockets_beyond_limit=beyond)
        return child_of(number, scope)

    many = kernel_watch.GROUPS_A_TURN * 2 + 1
    watched.jobs.update({number: job(number) for number in range(100, 100 + many)})
    watched.host.tcp += kernel_watch.STEP_BYTES + 1
    watched.watch._look()
    assert 0 < len(looked) <= kernel_watch.GROUPS_A_TURN
    for _ in range(2):
        before = len(looked)
        watched.watch._event_loop.run_once()
        assert len(looked) - before <= kernel_watch.GROUPS_A_TURN
    assert looked == [*range(100, 100 + many)]
    assert len(watched.ended) == many


LONG = {"used_seconds": 2.0}


def test_measurement_that_takes_much_rests_and_forgets_nothing(watched: Watched) -> None:
    watched.grow()
    watched.measurers.finish({**NONE, **LONG}, NONE, {"errno": errno.EINTR})
    watched.grow()
    assert len(watched.measurers.dones) == 1, "the one that took little"
    watched.measurers.finish(NONE)
    watched.watch._look()
    assert watched.measurers.dones == []
    watched.now += 1.01 * LONGEST_REST_SECONDS
    watched.watch._look()
    assert len(watched.measurers.dones) == 2
    watched.measurers.finish({**NONE, "held": [[1, MUCH]]}, NONE)
    assert watched.ended == [watched.jobs[1]]


def test_search_that_takes_much_rests_and_forgets_nothing(watched: Watched) -> None:
    watched.search({**FOUND, **LONG}, FOUND)
    watched.search(FOUND)
    watched.watch._look()
    assert watched.searchers.dones == [], "the job whose search took much is not searched again"
    watched.now += 1.01 * LONGEST_REST_SECONDS
    watched.watch._look()
    watched.searchers.finish({**FOUND, "locks": MUCH})
    assert watched.ended == [watched.jobs[1]]


def test_search_that_is_put_off_counts_though_another_that_does_not_is_wanted_meanwhile(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job fills and empties buffers of the kind that tells nothing by itself."""
    monkeypatch.setattr(kernel_watch, "AGAIN_SECONDS", 60)
    unsure = {**FOUND, **LONG, "is_all": False}
    watched.search(unsure, FOUND)
    for _ in range(kernel_verdicts.DOUBTS - 1):
        assert watched.ended == []
        watched.search(FOUND)
        watched.host.other += 2 * MUCH
        watched.watch._look()
        watched.measurers.finish(NONE)
        watched.searchers.finish(FOUND)
        watched.now += 1.01 * LONGEST_REST_SECONDS
        watched.watch._look()
        watched.searchers.finish(unsure)
    assert watched.ended == [watched.jobs[1]]


@pytest.mark.parametrize("seconds_each", [0, 0.01])
def test_groups_are_all_looked_at_before_it_begins_anew_and_rest(
    watched: Watched, seconds_each: float
) -> None:
    looked = list[int]()

    def job(number: int) -> Child:
        def beyond() -> int:
            looked.append(number)
            watched.used += seconds_each
            return 0

        return child_of(number, SimpleNamespace(sockets_beyond_limit=beyond))

    def grow() -> None:
        watched.host.tcp += kernel_watch.STEP_BYTES + 1
        watched.watch._look()

    many = kernel_watch.GROUPS_A_TURN * 2
    watched.jobs.clear()
    watched.jobs.update({number: job(number) for number in range(many)})
    grow()
    grow()
    watched.watch._event_loop.cancel(watched.watch._look_at_some)
    watched.watch._look_at_some()
    assert looked == [*range(many)]
    watched.watch._look()
    assert (len(looked) == many) == bool(seconds_each), "they rest"
    watched.now += 1.01 * LONGEST_REST_SECONDS
    watched.watch._look()
    assert len(looked) > many


def failed(code: int) -> dict[str, object]:
    return {"errno": code, "detail": "the process ended"}


def rest(watched: Watched) -> None:
    """Have what has failed made again, without another reason."""
    watched.now += 1.01 * LONGEST_REST_SECONDS
    watched.watch._look()


def test_job_whose_searches_fail_is_ended(watched: Watched) -> None:
    """They are made again by themselves, and what is known again meanwhile excuses nothing."""
    watched.search(failed(errno.EINTR), FOUND)
    watched.host.slabs -= MUCH
    for _ in range(kernel_verdicts.DOUBTS - 1):
        assert watched.ended == []
        watched.measurers.finish(*[NONE] * len(watched.measurers.dones))
        rest(watched)
        watched.searchers.finish(failed(errno.EINTR))
    assert watched.ended == [watched.jobs[1]]
    assert watched.jobs[1].hoards


def test_search_that_succeeds_excuses_those_that_failed(watched: Watched) -> None:
    for outcome in [*[failed(errno.EINTR)] * (kernel_verdicts.DOUBTS - 1), FOUND] * 2:
        watched.search(outcome, FOUND)
        watched.now += 1.01 * LONGEST_REST_SECONDS
    assert watched.ended == []


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM])
def test_search_for_which_the_host_had_no_room_is_made_again_and_ends_nothing(
    watched: Watched, code: int
) -> None:
    watched.search(failed(code), FOUND)
    for _ in range(2 * kernel_verdicts.DOUBTS):
        rest(watched)
        watched.searchers.finish(failed(code))
    assert watched.ended == []
    rest(watched)
    watched.searchers.finish({**FOUND, "locks": MUCH})
    assert watched.ended == [watched.jobs[1]]


def test_job_whose_search_cannot_be_ended_is_ended_at_once(watched: Watched) -> None:
    watched.search(FOUND, failed(UNENDING))
    assert watched.ended == [watched.jobs[2]]


def test_job_that_cannot_be_searched_for_others_that_do_not_end_is_ended(watched: Watched) -> None:
    watched.search(FOUND, FOUND)
    del watched.jobs[2]
    watched.searchers.refuses = errno.EAGAIN
    watched.search()
    watched.searchers.refuses = CROWDED
    for _ in range(kernel_verdicts.DOUBTS):
        assert watched.ended == []
        watched.watch._look()
        watched.watch._look()
        watched.now += 1.01 * LONGEST_REST_SECONDS
    assert watched.ended == [watched.jobs[1]]


def fail_to_measure(watched: Watched, number: int, job: int, code: int) -> None:
    """Have that measurement fail while it looks at this job, and the others succeed."""
    watched.measurers.works.clear()
    watched.watch._look()
    works, count = watched.measurers.works, len(watched.watch._measures)
    assert len(works) == count
    *_, look_at = works[number].args[0].args
    look_at(job)
    watched.measurers.finish(*[failed(code) if n == number else NONE for n in range(count)])


@pytest.mark.parametrize("number", range(3))
def test_job_at_which_a_measurement_fails_is_ended(watched: Watched, number: int) -> None:
    watched.host.slabs += kernel_watch.STEP_BYTES + 1
    for _ in range(kernel_verdicts.DOUBTS):
        assert watched.ended == []
        fail_to_measure(watched, number, 2, errno.EINTR)
        watched.now += 1.01 * LONGEST_REST_SECONDS
    assert watched.ended == [watched.jobs[2]]
    assert watched.jobs[2].hoards


def test_measurement_that_fails_at_no_job_ends_none(watched: Watched) -> None:
    for _ in range(2 * kernel_verdicts.DOUBTS):
        watched.host.slabs += kernel_watch.STEP_BYTES + 1
        fail_to_measure(watched, 0, 0, UNENDING)
        watched.now += 1.01 * LONGEST_REST_SECONDS
    assert watched.ended == []


def test_job_at_which_a_measurement_waits_without_an_end_is_ended_at_once(
    watched: Watched,
) -> None:
    watched.host.slabs += kernel_watch.STEP_BYTES + 1
    fail_to_measure(watched, 2, 1, UNENDING)
    assert watched.ended == [watched.jobs[1]]
    watched.grow()
    assert watched.measurers.dones, "and is made again"


def test_job_that_is_looked_at_is_told_by_a_process_that_dies(
    event_loop: EventLoop, forks: ForkServer
) -> None:
    outcomes, looked_at = list[Message](), kernel_looks.LookedAt()
    dies = partial(tell_and_die, looked_at.tell)
    Chores(event_loop, forks, at_once=1, waiting=0).start(dies, outcomes.append, [looked_at.memory])
    while not outcomes:
        event_loop.run_once()
    assert (outcomes[0]["errno"], looked_at.job) == (errno.EINTR, 7)
    looked_at.close()


def tell_and_die(tell: Callable[[int], None]) -> Message:
    tell(7)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_measurement_for_which_there_is_no_process_is_made_later_and_ends_no_job(
    watched: Watched,
) -> None:
    for _ in range(2 * kernel_verdicts.DOUBTS):
        watched.grow()
        lacks = {"errno": errno.EOWNERDEAD, "detail": "", "begun": False}
        watched.measurers.finish(*[lacks] * len(watched.measurers.dones))
    assert not watched.ended
    watched.grow()
    assert watched.measurers.dones


class File(str):
    """One whose locks are nobody's, which counts how often it is looked up or copied."""

    __slots__ = ()
    seen = 0

    def __hash__(self) -> int:
        File.seen += 1
        return super().__hash__()


def test_a_judgement_does_not_grow_with_the_jobs_times_what_is_nobodys(watched: Watched) -> None:
    watched.jobs.update({number: watched._job(number) for number in range(100, 200)})
    watched.grow()
    File.seen = 0
    unknown = [[File(f"00:01:{number}"), MUCH] for number in range(1000)]
    watched.measurers.finish({**NONE, "unknown": unknown}, NONE, NONE)
    assert len(watched.searchers.dones) == len(watched.jobs)
    assert File.seen <= 3 * len(unknown)


class Id(int):
    """A job's, which counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Id.compared += 1
        return int(self) == other

    def __hash__(self) -> int:
        return hash(int(self))


def test_a_judgement_does_not_grow_with_the_square_of_the_jobs(watched: Watched) -> None:
    ids = [Id(number) for number in range(100, 400)]
    watched.jobs.update({number: watched._job(number) for number in ids})
    watched.grow()
    Id.compared = watched.asked = 0
    sizes = [(number, 4096) for number in ids]
    told = {"held": sizes, "unfinished": ids[::-1], "in_sockets": sizes, "orphans": sizes}
    outcome = {**NONE, **told}
    watched.measurers.finish(NONE, NONE, outcome)
    assert watched.asked <= 3
    assert Id.compared <= 10 * len(ids)


def measure_sockets(
    watched: Watched,
    *in_sockets: tuple[int, int],
    orphans: Mapping[int, int] = MappingProxyType({}),
) -> None:
    """Have the host's memory grow for no reason that it names, and the sockets measured."""
    watched.host.other += kernel_watch.STEP_BYTES + 1
    watched.watch._look()
    told = {**NONE, "in_sockets": [*in_sockets], "orphans": [*orphans.items()]}
    watched.measurers.finish(told)


def test_job_whose_sockets_hold_more_than_its_group_counts_is_ended(watched: Watched) -> None:
    watched.counted.update({1: (MUCH, MUCH), 2: (MUCH, MUCH)})
    measure_sockets(watched, (0, 4 * MUCH), (1, 2 * MUCH - 1), (2, 2 * MUCH))
    assert watched.ended == [watched.jobs[2]]
    assert watched.jobs[2].hoards


def test_what_a_group_has_counted_since_the_last_time_may_be_what_sockets_held(
    watched: Watched,
) -> None:
    watched.counted[1] = (0, MUCH)
    measure_sockets(watched, (1, MUCH))
    assert watched.ended == []
    watched.watch._look()
    watched.measurers.finish({**NONE, "in_sockets": [(1, MUCH)]})
    assert watched.ended == [watched.jobs[1]], "it is measured again at once"
    watched.watch._look()
    assert len(watched.measurers.dones) <= 1, "and not without end"


def test_job_with_sockets_in_no_list_is_found_by_its_descriptors(watched: Watched) -> None:
    watched.host.other += MUCH
    measure_sockets(watched, (0, MUCH))
    assert watched.searchers.dones == [], "what was measured explains it"
    watched.host.other += MUCH
    measure_sockets(watched, (0, MUCH))
    watched.searchers.finish({**FOUND, "in_flight": 1}, {**FOUND, "in_sockets": MUCH})
    assert watched.ended == [watched.jobs[2]]


def measure_slabs(watched: Watched, *explained: int, sockets_first: bool = False) -> None:
    """Have slabs grow by more than the bound, and told what is known: of sockets over IP last."""
    watched.host.slabs += MUCH
    watched.watch._look()
    dones, watched.measurers.dones = watched.measurers.dones, []
    by_measure = {cast("partial[None]", done).args[0]: done for done in dones}
    told = list(zip(watched.watch._measures, explained, strict=True))
    for measure, size in reversed(told) if sockets_first else told:
        by_measure[measure]({**NONE, "held": [[0, size]]})


def test_job_with_small_buffers_in_no_list_is_found_by_its_descriptors(watched: Watched) -> None:
    """They are slabs, which much else takes of: nobody ends that is not found to hold them."""
    measure_slabs(watched, 0, 0, 0)
    watched.searchers.finish({**FOUND, "is_all": False}, {**FOUND, "in_sockets": MUCH})
    assert watched.ended == [watched.jobs[2]]


def test_search_goes_on_until_it_has_found_more_than_a_group_may_count(watched: Watched) -> None:
    """Else buffers that are counted would hide those that are not."""
    measure_slabs(watched, 0, 0, 0)
    enough = [work.args[0].keywords["enough_bytes"] for work in watched.searchers.works]
    assert len(enough) == 2
    assert min(enough) >= LIMIT + 2 * BOUND_BYTES, "a group may count the bound beyond its limit"


@pytest.mark.parametrize("explained", [(MUCH, 0, 0), (0, MUCH, 0), (0, 0, MUCH), (0, 9, MUCH)])
def test_slabs_that_are_explained_are_no_reason_to_search(
    watched: Watched, explained: Sequence[int]
) -> None:
    measure_slabs(watched, *explained)
    assert watched.searchers.dones == []
    measure_slabs(watched, *explained)
    assert len(watched.searchers.dones) == 2, "what was explained before explains no more"


def test_what_is_explained_too_late_hides_nothing_afterwards(watched: Watched) -> None:
    measure_slabs(watched, 0, MUCH, 0, sockets_first=True)
    watched.searchers.finish(FOUND, FOUND)
    measure_slabs(watched, 0, MUCH, 0)
    assert len(watched.searchers.dones) == 2


def test_orphans_that_were_there_before_a_job_are_not_its_doing(watched: Watched) -> None:
    """Sockets of an ended job, whose ids it has: as many as were there at the first measurement."""
    for size in (2 * MUCH, MUCH, 2 * MUCH):
        measure_sockets(watched, (1, size), (2, size), orphans={1: size, 2: size})
        assert watched.ended == []
    more = {1: 2 * MUCH, 2: 3 * MUCH}
    measure_sockets(watched, *more.items(), orphans=more)
    assert watched.ended == [watched.jobs[2]]


def test_orphans_are_not_a_jobs_that_was_measured_before_it_had_its_ids(watched: Watched) -> None:
    """While it prepares itself it has the launcher's, and what is there counts as nobody's."""
    measure_sockets(watched, (0, 2 * MUCH), orphans={0: 2 * MUCH})
    measure_sockets(watched, (1, 2 * MUCH), orphans={1: 2 * MUCH, 2: 0})
    assert watched.ended == []
    measure_sockets(watched, (1, 2 * MUCH), (2, MUCH), orphans={1: 2 * MUCH, 2: MUCH})
    assert watched.ended == [watched.jobs[2]], "its own: there were none at first"


@pytest.mark.parametrize("list_is_first", [True, False])
def test_what_was_counted_while_a_list_and_a_search_went_on_counts_for_both(
    watched: Watched, *, list_is_first: bool
) -> None:
    """All that the job's sockets held was counted, and is read before either is judged."""
    watched.host.other += MUCH
    measure_sockets(watched)
    watched.host.other += kernel_watch.STEP_BYTES + 1
    watched.watch._look()
    listed = {**NONE, "in_sockets": [(1, MUCH)]}
    found = {**FOUND, "in_sockets": MUCH}
    watched.counted[1] = (0, MUCH)
    for is_list in (list_is_first, not list_is_first):
        if is_list:
            watched.measurers.finish(listed)
        else:
            watched.searchers.finish(found, FOUND)
    assert watched.ended == []
    watched.watch._look()
    watched.measurers.finish(listed)
    assert watched.ended == [watched.jobs[1]], "it was counted before that list began"


def test_memory_of_the_hosts_own_puts_no_job_in_doubt(watched: Watched) -> None:
    for _ in range(3 * kernel_verdicts.DOUBTS):
        watched.host.other += MUCH
        measure_sockets(watched)
        watched.searchers.finish({**FOUND, "in_flight": 1}, {**FOUND, "is_all": False})
    assert watched.ended == []
