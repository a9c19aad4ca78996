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
reason to measure all sockets over IP: error queues and open datagrams are in no group either. The
group may count part of what a job's sockets hold. Both change meanwhile, so the highest count since
the measurement began comes off: what is left was surely held and not counted.

Sockets that no list has keep their buffers and options, in pages or in slabs. So where the first
and the third number together grow by more than all measurements explain, each job's descriptors are
searched for such sockets. Nobody is in doubt for these numbers alone: what is charged to jobs,
drivers and the host's programs change them, too.

A job can have more to search than there is time for, or hide it in flight. One search tells little
then. A job of which several in a row cannot tell, while what nobody is known to hold stays over the
bound, is ended too.

A process that looks at a job may die of what it meets there, or have to wait for what the job
holds. `sandbox.chores` ends one that waits. A job at which several looks in a row have failed is
ended, and so is one for which a process waits that cannot be ended: that lifts the job's I/O limit,
with which it holds the kernel's locks longest.

What must hold: a job holds no more of each kind than the bound, what the host's grows by before
it is looked at, and what the job can add meanwhile. No job delays the others' measurement: each
kind has a process of its own, with an end, and so has each job's search; one that cannot be ended
keeps no other from being started. None of them takes more of a processor than its pace
(`sandbox.kernel_memory.pace`), though a job can give a reason for each at any time: what is to be
measured while it rests is measured afterwards. Looking costs an idle launcher nothing.

Standard library only.
"""

import contextlib
import errno
import os
import struct
import time
from collections import ChainMap, Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from jobworker.sandbox import channel
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.chores import CROWDED, MOST_SECONDS, UNENDING, Chores
from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.kernel_memory import connections as kernel_connections
from jobworker.sandbox.kernel_memory import measure as kernel_memory
from jobworker.sandbox.kernel_memory import search as kernel_search
from jobworker.sandbox.kernel_memory.host import Figure, HostMemory
from jobworker.sandbox.kernel_memory.measure import BOUND_BYTES, LookAt, Measured
from jobworker.sandbox.kernel_memory.pace import Pace
from jobworker.sandbox.kernel_memory.search import Found
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.log import say

STEP_BYTES = 32 << 20
"""Growth of the host's that is a reason to look."""
LOOK_SECONDS = 0.05
"""In 0.2 s a job fills 600 MiB of error queues. A look takes 0.2 ms with two processors."""
LOOK_SHARE = 0.01
"""Of a processor, at the most: with hundreds of them a look takes milliseconds."""
SELDOM_SECONDS = 30.0
"""Looked at in any case this often: what others give back may hide what a job takes."""
AGAIN_SECONDS = 1.0
"""And this often while there are doubts: a descriptor is in flight for a moment, usually."""
GROUPS_A_TURN = 50
"""Two files each: a few milliseconds."""
DOUBTS = 3
"""So many in a row end a job, and so many looks at it that have failed."""
SEARCHES_AT_ONCE = 2
_NUMBER = struct.Struct("=Q")
_WANTS = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC}
"""What the host may lack, for which no job is to blame."""

Measure = Callable[[Mapping[int, int], LookAt], Measured]


class _Wanted(NamedTuple):
    """What a search of a job is to look for, beside what is nobody's."""

    sockets_too: bool = False
    doubts: bool = False
    """Whether one that cannot tell counts against the job: there is what is nobody's."""


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
        self._running, self._kill = running, kill
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
        self._wanted: dict[int, _Wanted] = {}
        """Jobs that are to be searched, and for what."""
        self._unknown: dict[Measure, dict[str, int]] = {}
        """What was nobody's the last time, by file. All searches share it."""
        self._searching: set[int] = set()
        self._search_paces: defaultdict[int, Pace] = defaultdict(Pace)
        self._counted: dict[Measure | None, dict[int, int]] = {
            kernel_connections.measure: {},
            None: {},
        }
        """What jobs' groups counted in sockets at most since the list, or each job's search, began.
        A read sets the kernel's own figure back, whichever of the two it is for."""
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
        self._doubts: Counter[tuple[int, object]] = Counter()
        """How many in a row could not tell of a job, by job and measure; None is the search."""
        self._failures: Counter[tuple[int, object]] = Counter()
        """How many looks in a row at a job have failed, by job and measure as above."""
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
        for counts in (self._doubts, self._failures):
            for doubt in [doubt for doubt in counts if doubt[0] not in running]:
                del counts[doubt]
        for ended in self._counted[None].keys() - running.keys():
            del self._counted[None][ended]
        for of_jobs in (self._search_paces, self._inherited):
            for ended in of_jobs.keys() - running.keys():
                del of_jobs[ended]
        patience = AGAIN_SECONDS if self._doubts or self._failures else SELDOM_SECONDS
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
        self._search_wanted(running)
        may = self._due - self._measuring
        due = [each for each in self._measures if each in may and not self._paces[each].rests(now)]
        pids = {child.pid: job for job, child in running.items()} if due else {}
        for measure in due:
            try:
                looked_at = _LookedAt()
            except OSError:  # no descriptor to be had: at the next look, then
                break
            work = partial(_in_its_own_proc, partial(measure, pids, looked_at.tell))
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
            self._counted.get(measure, {}).clear()

    def _look_at_some(self) -> None:
        """Read the groups of a few jobs in this turn: thousands would keep all others waiting."""
        began = time.thread_time()
        running = self._running()
        for job in self._unseen[:GROUPS_A_TURN]:
            if (child := running.get(job)) is not None:
                size = child.scope.sockets_beyond_limit()
                self._end_beyond(child, size, "in buffers of sockets beyond its limit")
        del self._unseen[:GROUPS_A_TURN]
        self._groups_pace.add(time.monotonic(), time.thread_time() - began)
        if self._unseen:
            self._turns.call_in(0, self._look_at_some)

    def _judge(self, measure: Measure, looked_at: "_LookedAt", outcome: channel.Message) -> None:
        self._measuring.discard(measure)
        job_looked_at = looked_at.job
        looked_at.close()
        if outcome.get("begun") is False:  # no process to be had: at the next look, then
            self._due.add(measure)
            return
        self._paces[measure].add(time.monotonic(), _used_by(outcome))
        if "errno" in outcome:
            at = f" at job {job_looked_at}" if job_looked_at else ""
            say(f"cannot measure jobs' kernel memory{at}: {outcome}")
            self._judge_failure(job_looked_at, measure, outcome)
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
                self._end_beyond(running[job], size)
        in_orphans = dict(orphans)
        for job, size in in_orphans.items():
            if job in running:
                self._inherited.setdefault(job, size)
        for job, size in in_sockets:
            if job in running:
                inherited = min(in_orphans.get(job, 0), self._inherited.get(job, 0))
                self._judge_sockets(job, running[job], measure, size - inherited)
        for job, child in running.items():
            why = "it has too many sockets" if job in uncounted else ""
            self._doubt(job, child, measure, why)
            del self._failures[job, measure]
        self._unknown[measure] = dict(unknown)
        is_much = sum(self._unknown[measure].values()) > BOUND_BYTES
        self._unsolved[measure] = is_much or bool(unfinished)
        told = sum(size for _, size in [*held, *unknown, *in_sockets])
        is_hidden = self._leaves_hidden(measure, told)
        if is_much or is_hidden:
            for job in running:
                sockets_too, doubts = self._wanted.get(job, _Wanted())
                self._wanted[job] = _Wanted(sockets_too or is_hidden, doubts or is_much)
            self._search_wanted(running)
        elif not any(self._unsolved.values()):
            self._doubts.clear()

    def _leaves_hidden(self, measure: Measure, told: int) -> bool:
        """Whether a list of sockets leaves more that nothing explains than the last one did."""
        self._explained[measure] = told
        if measure is kernel_connections.measure:
            return self._hidden.has_grown()
        self._hidden.wake()
        return False

    def _judge_sockets(self, job: int, child: Child, source: Measure | None, size: int) -> None:
        """What the job's group counts comes off, and is only surely known of a time to come."""
        if size > BOUND_BYTES:
            most, now = child.scope.sockets_counted()
            for counted in self._counted.values():
                counted[job] = max(counted.get(job, 0), most)
            uncounted = size - self._counted[source][job]
            self._end_beyond(child, uncounted, "in sockets that its control group does not count")
            if size - now > BOUND_BYTES:
                self._due.add(kernel_connections.measure)

    def _search_wanted(self, running: Mapping[int, Child]) -> None:
        now, unknown = time.monotonic(), ChainMap(*self._unknown.values())
        for job, wanted in list(self._wanted.items()):
            child = running.get(job)
            if child is None:
                del self._wanted[job]
            elif job not in self._searching and not self._search_paces[job].rests(now):
                search = partial(
                    kernel_search.search,
                    child.pid,
                    unknown,
                    sockets_too=wanted.sockets_too,
                    enough_bytes=child.scope.sockets_limit_bytes + 2 * BOUND_BYTES,
                )
                work = partial(_in_its_own_proc, search)
                judge = partial(self._judge_found, job, wanted)
                try:
                    self._searchers.start(work, judge)
                except OSError as error:
                    if error.errno == CROWDED:
                        judge({"errno": CROWDED, "detail": error.strerror})
                    continue  # no process to be had: at the next look, then
                self._searching.add(job)
                self._counted[None].pop(job, None)
                del self._wanted[job]

    def _judge_found(self, job: int, wanted: _Wanted, outcome: channel.Message) -> None:
        self._searching.discard(job)
        has_begun = outcome.get("begun") is not False
        if has_begun:
            self._search_paces[job].add(time.monotonic(), _used_by(outcome))
        child = self._running().get(job)
        if child is None:
            return
        if "errno" in outcome:
            sockets_too, doubts = self._wanted.get(job, _Wanted())
            self._wanted[job] = _Wanted(sockets_too or wanted.sockets_too, doubts or wanted.doubts)
            if has_begun:  # else there was no process to be had: at the next look, then
                say(f"cannot search job {job} for kernel memory: {outcome}")
                self._judge_failure(job, None, outcome)
            return
        del self._failures[job, None]
        locks, netlink, in_flight, is_all, in_sockets, in_requests = (
            outcome[name] for name in Found._fields
        )
        assert isinstance(locks, int)
        assert isinstance(in_requests, int)
        assert isinstance(in_sockets, int)
        assert isinstance(netlink, int)
        self._end_beyond(child, max(locks, netlink))
        self._judge_sockets(job, child, None, in_sockets)
        if wanted.doubts:  # not where the host's memory alone is a reason: much else takes of that
            why = "it has descriptors in flight" if in_flight else ""
            if in_requests > BOUND_BYTES:
                why = "requests over netlink may be its own"
            self._doubt(job, child, None, why if is_all else "it has too many descriptors")

    def _judge_failure(self, job: int, source: Measure | None, outcome: channel.Message) -> None:
        """A process has failed while it looked at this job, or had to be ended."""
        child = self._running().get(job)
        if child is None or outcome["errno"] in _WANTS:
            return
        self._failures[job, source] += 1
        if outcome["errno"] == UNENDING:
            self._end(child, "has a process that looks at it wait without an end")
        elif self._failures[job, source] >= DOUBTS:
            self._end(child, "may hold too much uncounted kernel memory: looks at it fail")

    def _doubt(self, job: int, child: Child, source: Measure | None, why: str) -> None:
        """Count one more in a row that could not tell, for this reason, or none that could."""
        if not why:
            del self._doubts[job, source]
            return
        self._doubts[job, source] += 1
        if self._doubts[job, source] >= DOUBTS:
            self._end(child, f"may hold too much uncounted kernel memory: {why}")

    def _end_beyond(
        self, child: Child, size: int, what: str = "of uncounted kernel memory"
    ) -> None:
        if size > BOUND_BYTES:
            self._end(child, f"holds {size >> 20} MiB {what}")

    def _end(self, child: Child, why: str) -> None:
        say(f"job {child.job} is ended: it {why}")
        child.hoards = True
        self._kill(child)


class _LookedAt:
    """The job that a process looks at, which is known whatever becomes of the process."""

    def __init__(self) -> None:
        self.memory = os.memfd_create("looked-at", os.MFD_CLOEXEC)
        """The process has it at the same number."""

    def tell(self, job: int) -> None:
        """In the process: what comes now is this job's, or with 0 no job's."""
        os.pwrite(self.memory, _NUMBER.pack(job), 0)

    @property
    def job(self) -> int:
        """The latest."""
        said = os.pread(self.memory, _NUMBER.size, 0)
        return int(_NUMBER.unpack(said)[0]) if said else 0

    def close(self) -> None:
        """Let go of it."""
        os.close(self.memory)


def _in_its_own_proc(work: Callable[[], Measured | Found]) -> channel.Message:
    """In a process: with a /proc of its own, which goes with it.

    What is looked up in the launcher's, the launcher would have to forget when it collects the job.
    """
    with contextlib.suppress(OSError):  # a kernel that lets no ordinary user do it: slower, then
        sc.unshare(sc.CLONE_NEWNS)
        sc.mount("proc", "/proc", "proc", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
    outcome: channel.Message = {
        name: list(value.items() if isinstance(value, dict) else value)
        if isinstance(value, dict | frozenset)
        else value
        for name, value in work()._asdict().items()
    }
    return {**outcome, "used_seconds": time.process_time()}


def _used_by(outcome: channel.Message) -> float:
    """What a process has used of a processor; one that had to be ended, as long as it could."""
    used = outcome.get("used_seconds", MOST_SECONDS)
    assert isinstance(used, int | float)
    return used
