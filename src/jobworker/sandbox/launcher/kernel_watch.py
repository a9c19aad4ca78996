"""Ends a job that holds too much of the kernel memory that no control group counts.

A measurement takes a process a while (`sandbox.kernel_memory.measure`). So the watch polls three
cheap numbers of the whole host, and measures when one of them has grown:

1. Slab memory that the kernel cannot reclaim (/proc/meminfo). It is a reason for all measurements.
   A job that holds more than `BOUND_BYTES` is ended as out of memory. If the measurements find more
   than that without an owner, each job is searched (`sandbox.kernel_memory.search`).
2. Memory of TCP sockets (/proc/net/sockstat). On cgroup v1 TCP buffers have a limit of their own in
   each group, which the kernel lets each socket exceed by a piece or two. So the watch reads the
   excess from the jobs' groups; it counts like other memory. The watch also measures connections
   that no process has accepted (`sandbox.kernel_memory.connections`), which no group counts.
3. Pages that /proc/meminfo has under no name (`sandbox.kernel_memory.host_memory`). It is a reason
   to measure all IP sockets, since no group counts their error queues and open datagrams.

A socket that is in no list of the kernel still keeps its buffers and options, in pages or in slabs.
So if the first and the third number together grow by more than all measurements explain, the watch
has each job's descriptors searched for such sockets and for pipes. These two numbers alone are no
reason to doubt a job: memory that is charged to jobs, drivers and the host's programs change them.

`sandbox.launcher.kernel_searches` has the searches. `sandbox.launcher.kernel_verdicts` decides
which jobs end; this includes jobs for which several looks in a row had no clear result or failed.

What must hold: a job never holds more of one kind than the sum of the bound, the growth of the host
that is a reason to look (`STEP_BYTES`), and what the job can add before the measurement is done. No
job delays the measurement of others: each kind of measurement has a process of its own with a time
limit, and so has each search. A process that cannot be ended keeps no other from being started.
None of them takes more of a processor than its pace (`sandbox.kernel_memory.cpu_budget`), although
a job can give a reason for each at any time: a measurement that is due during a pause is done after
it. An idle launcher does not poll.

Standard library only.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

from jobworker.sandbox import channel
from jobworker.sandbox.chores import CROWDED, Chores
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.kernel_memory import connections as kernel_connections
from jobworker.sandbox.kernel_memory import measure as kernel_memory
from jobworker.sandbox.kernel_memory.cpu_budget import CpuBudget
from jobworker.sandbox.kernel_memory.host_memory import GrowthDetector, HostMemory
from jobworker.sandbox.kernel_memory.measure import BOUND_BYTES, LookAt, Measurement
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.kernel_looks import LookedAt, in_its_own_proc, used_by
from jobworker.sandbox.launcher.kernel_searches import Searches
from jobworker.sandbox.launcher.kernel_verdicts import AGAIN_SECONDS, Verdicts
from jobworker.sandbox.log import log_line

STEP_BYTES = 32 << 20
"""How much one of the host's numbers has to grow to be a reason for a measurement."""
LOOK_SECONDS = 0.05
"""The shortest pause between two polls of the host's numbers. A job can fill 600 MiB of error
queues in 0.2 s. A poll takes 0.2 ms with two processors."""
LOOK_SHARE = 0.01
"""The share of a processor that polls may take. With hundreds of processors a poll takes
milliseconds, so the pause gets longer."""
SELDOM_SECONDS = 30.0
"""The longest time without a measurement: memory that others free may hide what a job takes."""
GROUPS_A_TURN = 50
"""How many jobs' groups are read in one turn. Each has two files, so a turn takes a few ms."""
SEARCHES_AT_ONCE = 2

Measure = Callable[[Mapping[int, int], LookAt], Measurement]


class KernelWatch:
    """Polls the host's numbers while jobs run, and starts measurements and searches."""

    def __init__(
        self,
        event_loop: EventLoop,
        forks: ForkServer,
        slots: int,
        running: Callable[[], dict[int, Child]],
        kill: Callable[[Child], None],
        locks: int,
    ) -> None:
        self._event_loop, self._locks = event_loop, locks
        self._running = running
        self._verdicts = Verdicts(running, kill)
        self._measures: tuple[Measure, ...] = (
            kernel_memory.measure_netlink,
            partial(kernel_memory.measure_locks, locks),
            kernel_connections.measure,
        )
        kinds = len(self._measures)
        self._measurers = Chores(event_loop, forks, at_once=kinds, waiting=0, unending=kinds)
        self._searchers = Chores(
            event_loop, forks, at_once=SEARCHES_AT_ONCE, waiting=slots, unending=slots
        )
        self._searches = Searches(
            self._searchers,
            running,
            self._verdicts,
            lambda: self._due.add(kernel_connections.measure),
        )
        host = HostMemory()
        self._explained: dict[Measure, int] = {}
        """The bytes that each measurement found the last time, of jobs and of others."""
        self._slabs, self._tcp, self._unnamed = (
            GrowthDetector(read, STEP_BYTES)
            for read in (host.unreclaimable, host.in_tcp, host.unnamed)
        )
        self._hidden = GrowthDetector(
            lambda: host.unnamed() + host.unreclaimable() - sum(self._explained.values()),
            BOUND_BYTES,
        )
        self._due: set[Measure] = set()
        self._measuring: set[Measure] = set()
        self._paces: dict[Measure, CpuBudget] = {measure: CpuBudget() for measure in self._measures}
        self._unknown: dict[Measure, dict[str, int]] = {}
        """The memory for which each measurement found no owner the last time, by file. All searches
        share it."""
        self._inherited: dict[int, int] = {}
        """The bytes in orphaned sockets with a job's ids, when they were found for the first time.
        Some may be of an ended job that had these ids before, so they do not count against this
        job. A job that still prepares itself does not use its ids yet."""
        self._groups_due = False
        self._groups_pace = CpuBudget()
        self._unseen: list[int] = []
        """The jobs whose groups are still to be read for memory of their sockets."""
        self._unsolved: dict[Measure, bool] = {}
        """Whether a measurement found more than the bound without an owner, or was incomplete."""
        self._measured_at = time.monotonic()
        self._pause = LOOK_SECONDS

    def wake(self) -> None:
        """Begin to poll, because a job runs. The polls end when no job runs any more."""
        if not self._event_loop.is_scheduled(self._look):
            self._explained.clear()
            for figure in (self._slabs, self._tcp, self._unnamed, self._hidden):
                figure.wake()
            self._event_loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        running = self._running()
        if not running:
            return
        self._event_loop.call_later(self._pause, self._look)
        self._verdicts.forget_all_but(running.keys())
        self._searches.forget_all_but(running.keys())
        for ended in self._inherited.keys() - running.keys():
            del self._inherited[ended]
        patience = AGAIN_SECONDS if self._verdicts.are_pending else SELDOM_SECONDS
        overdue = time.monotonic() > self._measured_at + patience
        began = time.thread_time()
        slabs, unnamed, tcp = (each.has_grown() for each in (self._slabs, self._unnamed, self._tcp))
        self._pause = max(LOOK_SECONDS, (time.thread_time() - began) / LOOK_SHARE)
        if slabs or overdue:
            self._due.update(self._measures)
            self._measured_at = time.monotonic()
        if unnamed:
            self._due.add(kernel_connections.measure)
        if tcp or overdue:
            self._due.add(kernel_connections.measure)
            self._groups_due = True
        self._start_due(running)

    def _start_due(self, running: Mapping[int, Child]) -> None:
        """Begin what is due, except for what is under way already or has to wait for its pace."""
        now = time.monotonic()
        is_looking = self._event_loop.is_scheduled(self._look_at_some)
        if self._groups_due and not is_looking and not self._groups_pace.is_overdrawn(now):
            self._groups_due = False
            self._unseen = list(running)
            self._look_at_some()
        self._searches.start(running, list(self._unknown.values()))
        may = self._due - self._measuring
        due = [
            each
            for each in self._measures
            if each in may and not self._paces[each].is_overdrawn(now)
        ]
        pids = {child.pid: job for job, child in running.items()} if due else {}
        for measure in due:
            try:
                looked_at = LookedAt()
            except OSError:  # no descriptor is left: the next poll tries again
                break
            work = partial(in_its_own_proc, partial(measure, pids, looked_at.tell))
            judge = partial(self._judge, measure, looked_at)
            self._due.discard(measure)
            try:
                self._measurers.start(work, judge, [self._locks, looked_at.memory])
            except OSError as error:
                if error.errno == CROWDED:
                    judge({"errno": CROWDED, "detail": error.strerror})
                else:  # no process can be made now: the next poll tries again
                    looked_at.close()
                    self._due.add(measure)
                continue
            self._measuring.add(measure)
            self._verdicts.begin(measure)

    def _look_at_some(self) -> None:
        """Read the groups of a few jobs, and go on in the next turn.

        All of them in one turn would make the turn too long.
        """
        began = time.thread_time()
        running = self._running()
        for job in self._unseen[:GROUPS_A_TURN]:
            if (child := running.get(job)) is not None:
                size = child.scope.sockets_beyond_limit()
                self._verdicts.end_beyond(child, size, "in buffers of sockets beyond its limit")
        del self._unseen[:GROUPS_A_TURN]
        self._groups_pace.charge(time.monotonic(), time.thread_time() - began)
        if self._unseen:
            self._event_loop.call_later(0, self._look_at_some)

    def _judge(self, measure: Measure, looked_at: LookedAt, outcome: channel.Message) -> None:
        self._measuring.discard(measure)
        job_looked_at = looked_at.job
        looked_at.close()
        if outcome.get("begun") is False:  # no process could be made: the next poll tries again
            self._due.add(measure)
            return
        self._paces[measure].charge(time.monotonic(), used_by(outcome))
        if "errno" in outcome:
            at = f" at job {job_looked_at}" if job_looked_at else ""
            log_line(f"cannot measure jobs' kernel memory{at}: {outcome}")
            self._verdicts.failed(job_looked_at, measure, outcome)
            return
        held, unknown, unfinished, in_sockets, orphans = (
            outcome[name] for name in Measurement._fields
        )
        assert isinstance(held, list)
        assert isinstance(unknown, list)
        assert isinstance(unfinished, list)
        assert isinstance(in_sockets, list)
        assert isinstance(orphans, list)
        running, uncounted = self._running(), frozenset(unfinished)
        for job, size in held:
            if job in running:
                self._verdicts.end_beyond(running[job], size)
        self._judge_sockets(running, measure, dict(in_sockets), dict(orphans))
        for job, child in running.items():
            why = "it has too many sockets" if job in uncounted else ""
            self._verdicts.doubt(job, child, measure, why)
            self._verdicts.succeeded(job, measure)
        self._unknown[measure] = dict(unknown)
        is_much = sum(self._unknown[measure].values()) > BOUND_BYTES
        self._unsolved[measure] = is_much or bool(unfinished)
        told = sum(size for _, size in [*held, *unknown, *in_sockets])
        is_hidden = self._leaves_hidden(measure, told)
        if is_much or is_hidden:
            for job in running:
                self._searches.want(job, sockets_too=is_hidden, doubts=is_much)
            self._searches.start(running, list(self._unknown.values()))
        elif not any(self._unsolved.values()):
            self._verdicts.excuse_all()

    def _judge_sockets(
        self,
        running: Mapping[int, Child],
        measure: Measure,
        in_sockets: Mapping[int, int],
        orphans: Mapping[int, int],
    ) -> None:
        for job, size in orphans.items():
            if job in running:
                self._inherited.setdefault(job, size)
        for job, size in in_sockets.items():
            if job in running:
                inherited = min(orphans.get(job, 0), self._inherited.get(job, 0))
                if self._verdicts.judge_sockets(job, running[job], measure, size - inherited):
                    self._due.add(kernel_connections.measure)

    def _leaves_hidden(self, measure: Measure, told: int) -> bool:
        """Whether a list of sockets leaves more memory unexplained than the list before did.

        `told`: the bytes that the measurement has found.
        """
        self._explained[measure] = told
        if measure is kernel_connections.measure:
            return self._hidden.has_grown()
        self._hidden.wake()
        return False
