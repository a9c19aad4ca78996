"""Ends a job that holds more kernel memory than it may of what no control group counts.

Measuring that takes a process a while (`sandbox.kernel_memory.measure`), so it is done only when
there is a reason: the kernel's memory that cannot be given back, which one line of /proc/meminfo
tells for the whole host, has grown. Who holds more than `BOUND_BYTES` then is ended as out of
memory. Where so much is found that nothing tells whose it is, each job is searched
(`sandbox.kernel_memory.search`).

Buffers of TCP sockets have a control group's limit of their own on cgroup v1, which the kernel lets
each socket pass by a piece or two. What is beyond it counts like the rest: it is read from the
jobs' groups where the host's number for TCP (/proc/net/sockstat) has grown. The same is a reason to
measure what nobody has accepted (`sandbox.kernel_memory.connections`), which no group counts.

A third number of the host's, pages that it has no name for (`sandbox.kernel_memory.host`), is a
reason to measure all sockets over IP: error queues and open datagrams are in no group either.

Sockets that no list has keep their buffers and options, in pages or in slabs. So where the first
and the third number together grow by more than all measurements explain, each job's descriptors are
searched for such sockets, and for pipes. Nobody is in doubt for these numbers alone: what is
charged to jobs, drivers and the host's programs change them, too.

`sandbox.launcher.kernel_searches` has the searches, and `sandbox.launcher.kernel_verdicts` says who
ends: also a job of which several looks in a row cannot tell, or at which they fail.

What must hold: a job holds no more of each kind than the bound, what the host's grows by before
it is looked at, and what the job can add meanwhile. No job delays the others' measurement: each
kind has a process of its own, with an end, and so has each job's search; one that cannot be ended
keeps no other from being started. None of them takes more of a processor than its pace
(`sandbox.kernel_memory.pace`), though a job can give a reason for each at any time: what is to be
measured while it rests is measured afterwards. Looking costs an idle launcher nothing.

Standard library only.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

from jobworker.sandbox import channel
from jobworker.sandbox.chores import CROWDED, Chores
from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.kernel_memory import connections as kernel_connections
from jobworker.sandbox.kernel_memory import measure as kernel_memory
from jobworker.sandbox.kernel_memory.host import Figure, HostMemory
from jobworker.sandbox.kernel_memory.measure import BOUND_BYTES, LookAt, Measured
from jobworker.sandbox.kernel_memory.pace import Pace
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.kernel_looks import LookedAt, in_its_own_proc, used_by
from jobworker.sandbox.launcher.kernel_searches import Searches
from jobworker.sandbox.launcher.kernel_verdicts import AGAIN_SECONDS, Verdicts
from jobworker.sandbox.log import say

STEP_BYTES = 32 << 20
"""Growth of the host's that is a reason to look."""
LOOK_SECONDS = 0.05
"""In 0.2 s a job fills 600 MiB of error queues. A look takes 0.2 ms with two processors."""
LOOK_SHARE = 0.01
"""Of a processor, at the most: with hundreds of them a look takes milliseconds."""
SELDOM_SECONDS = 30.0
"""Looked at in any case this often: what others give back may hide what a job takes."""
GROUPS_A_TURN = 50
"""Two files each: a few milliseconds."""
SEARCHES_AT_ONCE = 2

Measure = Callable[[Mapping[int, int], LookAt], Measured]


class KernelWatch:
    """Looks at the host's number, and where that grows at each job."""

    def __init__(
        self,
        turns: Turns,
        forks: ForkServer,
        slots: int,
        running: Callable[[], dict[int, Child]],
        kill: Callable[[Child], None],
        locks: int,
    ) -> None:
        self._turns, self._locks = turns, locks
        self._running = running
        self._verdicts = Verdicts(running, kill)
        self._measures: tuple[Measure, ...] = (
            kernel_memory.measure_netlink,
            partial(kernel_memory.measure_locks, locks),
            kernel_connections.measure,
        )
        kinds = len(self._measures)
        self._measurers = Chores(turns, forks, at_once=kinds, waiting=0, unending=kinds)
        self._searchers = Chores(
            turns, forks, at_once=SEARCHES_AT_ONCE, waiting=slots, unending=slots
        )
        self._searches = Searches(
            self._searchers,
            running,
            self._verdicts,
            lambda: self._due.add(kernel_connections.measure),
        )
        host = HostMemory()
        self._explained: dict[Measure, int] = {}
        """What each measurement told the last time, of jobs and of others."""
        self._slabs, self._tcp, self._unnamed = (
            Figure(read, STEP_BYTES) for read in (host.unreclaimable, host.in_tcp, host.unnamed)
        )
        self._hidden = Figure(
            lambda: host.unnamed() + host.unreclaimable() - sum(self._explained.values()),
            BOUND_BYTES,
        )
        self._due: set[Measure] = set()
        self._measuring: set[Measure] = set()
        self._paces: dict[Measure, Pace] = {measure: Pace() for measure in self._measures}
        self._unknown: dict[Measure, dict[str, int]] = {}
        """What was nobody's the last time, by file. All searches share it."""
        self._inherited: dict[int, int] = {}
        """What orphans with a job's ids held when these were found for the first time: those of an
        ended job that had them before may be among these, and are not the job's doing. A job that
        still prepares itself has not its ids yet."""
        self._groups_due = False
        self._groups_pace = Pace()
        self._unseen: list[int] = []
        """Jobs whose groups are still to be looked at, for what their sockets hold."""
        self._unsolved: dict[Measure, bool] = {}
        """Whether it could not tell whose more than the bound is."""
        self._measured_at = time.monotonic()
        self._pause = LOOK_SECONDS

    def wake(self) -> None:
        """A job runs: look from now on, until none does."""
        if not self._turns.is_set(self._look):
            self._explained.clear()
            for figure in (self._slabs, self._tcp, self._unnamed, self._hidden):
                figure.wake()
            self._turns.call_in(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        running = self._running()
        if not running:
            return
        self._turns.call_in(self._pause, self._look)
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
        """Begin what is due, as far as it is not under way and does not rest."""
        now = time.monotonic()
        is_looking = self._turns.is_set(self._look_at_some)
        if self._groups_due and not is_looking and not self._groups_pace.rests(now):
            self._groups_due = False
            self._unseen = list(running)
            self._look_at_some()
        self._searches.start(running, list(self._unknown.values()))
        may = self._due - self._measuring
        due = [each for each in self._measures if each in may and not self._paces[each].rests(now)]
        pids = {child.pid: job for job, child in running.items()} if due else {}
        for measure in due:
            try:
                looked_at = LookedAt()
            except OSError:  # no descriptor to be had: at the next look, then
                break
            work = partial(in_its_own_proc, partial(measure, pids, looked_at.tell))
            judge = partial(self._judge, measure, looked_at)
            self._due.discard(measure)
            try:
                self._measurers.start(work, judge, [self._locks, looked_at.memory])
            except OSError as error:
                if error.errno == CROWDED:
                    judge({"errno": CROWDED, "detail": error.strerror})
                else:  # no process to be had: at the next look, then
                    looked_at.close()
                    self._due.add(measure)
                continue
            self._measuring.add(measure)
            self._verdicts.begin(measure)

    def _look_at_some(self) -> None:
        """Read the groups of a few jobs in this turn: thousands would keep all others waiting."""
        began = time.thread_time()
        running = self._running()
        for job in self._unseen[:GROUPS_A_TURN]:
            if (child := running.get(job)) is not None:
                size = child.scope.sockets_beyond_limit()
                self._verdicts.end_beyond(child, size, "in buffers of sockets beyond its limit")
        del self._unseen[:GROUPS_A_TURN]
        self._groups_pace.add(time.monotonic(), time.thread_time() - began)
        if self._unseen:
            self._turns.call_in(0, self._look_at_some)

    def _judge(self, measure: Measure, looked_at: LookedAt, outcome: channel.Message) -> None:
        self._measuring.discard(measure)
        job_looked_at = looked_at.job
        looked_at.close()
        if outcome.get("begun") is False:  # no process to be had: at the next look, then
            self._due.add(measure)
            return
        self._paces[measure].add(time.monotonic(), used_by(outcome))
        if "errno" in outcome:
            at = f" at job {job_looked_at}" if job_looked_at else ""
            say(f"cannot measure jobs' kernel memory{at}: {outcome}")
            self._verdicts.failed(job_looked_at, measure, outcome)
            return
        held, unknown, unfinished, in_sockets, orphans = (
            outcome[name] for name in Measured._fields
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
        """Whether a list of sockets leaves more that nothing explains than the last one did."""
        self._explained[measure] = told
        if measure is kernel_connections.measure:
            return self._hidden.has_grown()
        self._hidden.wake()
        return False
