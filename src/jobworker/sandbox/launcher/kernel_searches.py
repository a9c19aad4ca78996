"""Searches of jobs for uncounted kernel memory: a queue of jobs, and a process for each search.

The watch has a job searched for one of two reasons. Either a measurement found much memory that
belongs to no known job, or the host's kernel memory grew by more than all measurements explain. In
the second case the search also inspects the job's sockets and pipes. Two searches run at a time.
After a search that used much of a processor, the job's next search has to wait
(`sandbox.kernel_memory.cpu_budget`). A search that has failed is repeated.

The kernel charges some of the memory in pipes to the job, and some not. So only the part beyond the
job's memory limit counts against the job.

Standard library only.
"""

import time
from collections import ChainMap, defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import NamedTuple

from jobworker.sandbox import channel
from jobworker.sandbox.chores import CROWDED, Chores
from jobworker.sandbox.kernel_memory import search as kernel_search
from jobworker.sandbox.kernel_memory.cpu_budget import CpuBudget
from jobworker.sandbox.kernel_memory.measure import BOUND_BYTES
from jobworker.sandbox.kernel_memory.search import SearchResult
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.kernel_looks import in_its_own_proc, used_by
from jobworker.sandbox.launcher.kernel_verdicts import AGAIN_SECONDS, PIPES, Verdicts
from jobworker.sandbox.log import log_line


class _SearchTargets(NamedTuple):
    """The reasons for the search of a job."""

    sockets_too: bool = False
    """Whether to inspect its sockets and pipes as well."""
    doubts: bool = False
    """Whether a search without a clear result counts against the job, because a measurement found
    memory that belongs to no known job."""


class Searches:
    """The searches of the running jobs."""

    def __init__(
        self,
        chores: Chores,
        running: Callable[[], dict[int, Child]],
        verdicts: Verdicts,
        measure_sockets_again: Callable[[], None],
    ) -> None:
        self._chores, self._running, self._verdicts = chores, running, verdicts
        self._measure_sockets_again = measure_sockets_again
        self._wanted: dict[int, _SearchTargets] = {}
        """The jobs that wait for a search, with its reasons."""
        self._again_at: dict[int, float] = {}
        """When to search again the jobs whose pipes are in doubt (monotonic clock, seconds)."""
        self._under_way: set[int] = set()
        self._paces: defaultdict[int, CpuBudget] = defaultdict(CpuBudget)

    def forget_all_but(self, running: Collection[int]) -> None:
        """Drop the state of jobs that have ended."""
        for of_jobs in (self._paces, self._again_at):
            for ended in of_jobs.keys() - running:
                del of_jobs[ended]

    def want(self, job: int, *, sockets_too: bool, doubts: bool) -> None:
        """Queue a job for a search. The reasons of a search that has not begun are kept too."""
        before = self._wanted.get(job, _SearchTargets())
        self._wanted[job] = _SearchTargets(
            before.sockets_too or sockets_too, before.doubts or doubts
        )

    def start(self, running: Mapping[int, Child], unknown: list[dict[str, int]]) -> None:
        """Begin the queued searches that need not wait for their pace.

        `unknown`: the memory that belongs to no known job, by file, from each measurement.
        """
        now, files = time.monotonic(), ChainMap(*unknown)
        for job in [job for job, moment in self._again_at.items() if moment <= now]:
            del self._again_at[job]
            self.want(job, sockets_too=True, doubts=False)
        for job, wanted in list(self._wanted.items()):
            child = running.get(job)
            if child is None:
                del self._wanted[job]
            elif job not in self._under_way and not self._paces[job].is_overdrawn(now):
                search = partial(
                    kernel_search.search,
                    child.pid,
                    files,
                    sockets_too=wanted.sockets_too,
                    enough_bytes=_enough_bytes(child),
                )
                work = partial(in_its_own_proc, search)
                judge = partial(self._judge, job, wanted)
                try:
                    self._chores.start(work, judge)
                except OSError as error:
                    if error.errno == CROWDED:
                        judge({"errno": CROWDED, "detail": error.strerror})
                    continue  # no process can be made now: `_look` tries again
                self._under_way.add(job)
                self._verdicts.begin(None, job)
                del self._wanted[job]

    def _judge(self, job: int, wanted: _SearchTargets, outcome: channel.Message) -> None:
        self._under_way.discard(job)
        has_begun = outcome.get("begun") is not False
        if has_begun:
            self._paces[job].charge(time.monotonic(), used_by(outcome))
        child = self._running().get(job)
        if child is None:
            return
        if "errno" in outcome:
            self.want(job, **wanted._asdict())
            if has_begun:  # else no process could be made, and `_look` tries again
                log_line(f"cannot search job {job} for kernel memory: {outcome}")
                self._verdicts.failed(job, None, outcome)
            return
        self._verdicts.succeeded(job, None)
        found = _found_in(outcome)
        self._verdicts.end_beyond(child, max(found.locks, found.netlink))
        if self._verdicts.judge_sockets(job, child, None, found.in_sockets):
            self._measure_sockets_again()
        if wanted.doubts:  # growth of the host's memory alone proves nothing about a job
            why = "it has descriptors in flight" if found.in_flight else ""
            if found.in_requests > BOUND_BYTES:
                why = "requests over netlink may be its own"
            why = why if found.is_all else "it has too many descriptors"
            self._verdicts.doubt(job, child, None, why)
        if wanted.sockets_too:
            self._judge_pipes(job, child, found)

    def _judge_pipes(self, job: int, child: Child, found: SearchResult) -> None:
        beyond = found.in_pipes - child.scope.sockets_limit_bytes
        self._verdicts.end_beyond(child, beyond, "in pipes beyond its memory limit")
        is_much = found.most_in_pipes > _enough_bytes(child)
        self._verdicts.doubt(job, child, PIPES, "its pipes keep too many pieces" if is_much else "")
        if is_much:
            self._again_at[job] = time.monotonic() + AGAIN_SECONDS


def _enough_bytes(child: Child) -> int:
    return child.scope.sockets_limit_bytes + 2 * BOUND_BYTES


def _found_in(outcome: channel.Message) -> SearchResult:
    numbers = [outcome[name] for name in SearchResult._fields]
    assert all(isinstance(number, int) for number in numbers)
    return SearchResult(*numbers)  # type: ignore[arg-type]
