"""The starts of jobs, each from its request until its program runs or the start has failed.

`spawn` asks `launcher.child_supply` for a child. If no slot is free but some are about to become
free, the start waits for one. A start may be given up: the service asks for that, or has gone, or
the start takes too long.

What must hold: the service is told that a program was not executed only if that is certain
(`launcher.held_starts`), since it may then start the job again.

Standard library only.
"""

import errno
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from jobworker.errors import JobworkerError, SandboxError
from jobworker.sandbox import channel
from jobworker.sandbox.launcher import held_starts
from jobworker.sandbox.launcher.child import NOBODY, Child, PendingStart
from jobworker.sandbox.launcher.child_messages import ChildMessages
from jobworker.sandbox.launcher.child_supply import ChildSupply
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.ends import Ends
from jobworker.sandbox.launcher.jobs import Jobs
from jobworker.sandbox.launcher.kernel_watch import KernelWatch
from jobworker.sandbox.launcher.orders import Orders
from jobworker.sandbox.launcher.reports import (
    GIVEN_UP,
    MAY_HAVE_RUN,
    NO_MEMORY_ABOVE,
    TOO_LITTLE_MEMORY,
    Tell,
    fault,
    problem,
    too_long,
)
from jobworker.sandbox.launcher.spares import Spares
from jobworker.sandbox.launcher.start_replies import StartReplies
from jobworker.sandbox.launcher.walls import Walls
from jobworker.sandbox.log import log_line
from jobworker.sandbox.protocol import requests
from jobworker.sandbox.protocol.operations import SPAWN
from jobworker.sandbox.start import trampoline
from jobworker.sandbox.start.plan import finish

START_SECONDS = 30.0
"""The launcher gives up a start that takes longer, since the cause may never go away."""
GIVE_UP_SECONDS = 3.0
"""How long the launcher waits for a failed start to be cleared away before it reports the failure.
"""
LOOK_AT_STARTS_SECONDS = 0.5
"""The period of `_look_at_starts`. The age of a start is counted in these periods, not in seconds
of the clock: a launcher that was itself stopped for a while then gives no start up."""


class Starts:
    """Starts that wait for a slot, and the time limits of all starts.

    `tell` sends the replies to the service. `locks` is a descriptor for `KernelWatch`.
    """

    def __init__(self, pool: ChildPool, jobs: Jobs, spares: int, tell: Tell, locks: int) -> None:
        event_loop = pool.event_loop
        self._event_loop, self._jobs, self._tell = event_loop, jobs, tell
        self._slots = pool.slots
        self._late: deque[tuple[int, requests.Spawn, int]] = deque()
        """Starts that wait for the slot of an ended child: the number of the request, the request,
        and the value of `_looks` at which the launcher gives the start up."""
        self._looks = 0
        """How often `_look_at_starts` has run."""
        self._replies = StartReplies(tell)
        self._walls = Walls(event_loop, pool.networks, jobs.children, tell)
        self._kernel_watch = KernelWatch(
            event_loop, pool.forks, pool.slots, jobs.running, jobs.kill, locks
        )
        ready, orders = Spares(spares), Orders(pool, jobs.kill)
        self._messages = ChildMessages(
            event_loop, pool.sweepers, ready, orders, jobs.kill, self._on_started
        )
        ends = Ends(
            pool, jobs, self._messages, self._walls, tell, self._on_failed, self._start_late
        )
        self._supply = ChildSupply(pool, jobs, ready, orders, ends, self._replies)

    def spawn(self, number: int, request: requests.Spawn) -> None:
        """Start a job. The reply to request `number` is sent later, by `tell`.

        Raises OSError or JobworkerError if the start cannot be tried. Nothing is left of it then.
        """
        if self._jobs.find(request.job) is not None or self._is_late(request.job):
            raise SandboxError(
                "the job's id is in use", data={"step": "job", "errno": errno.EEXIST}
            )
        self._jobs.remember_unstarted(request.job)
        if self._jobs.count + len(self._late) >= self._slots:
            raise SandboxError(
                "every place is in use, by jobs that were not removed", data={"step": "place"}
            )
        if not self._event_loop.is_scheduled(self._look_at_starts):
            self._event_loop.call_later(LOOK_AT_STARTS_SECONDS, self._look_at_starts)
        by = self._looks + round(START_SECONDS / LOOK_AT_STARTS_SECONDS)
        if self._late or self._supply.must_wait(request.order):
            self._late.append((number, request, by))
        else:
            self._start(number, request, by)

    def close(self) -> None:
        """Make no spare any more, and drop the starts that wait."""
        self._supply.close()
        self._late.clear()

    def _start(self, number: int, request: requests.Spawn, by: int) -> None:
        start = PendingStart(number, request, trampoline.exec_image(*finish(request.order)), by)
        if not self._supply.give(start):
            self._late.appendleft((number, request, by))

    def _on_started(self, child: Child) -> None:
        """Report that a job's program runs, and begin to watch the job."""
        assert child.job is not None
        child.started_at = time.monotonic()
        self._jobs.forget_unstarted(child.job)
        self._replies.succeed(child)
        self._kernel_watch.wake()
        self._event_loop.call_with_retries(partial(self._walls.build, child))

    def _on_failed(self, child: Child) -> None:
        """Report the failure of a start whose child has ended, once nothing of it is left."""
        if child.final_want and child.failure is not MAY_HAVE_RUN:
            over = child.final_want == "limit"
            child.failure = TOO_LITTLE_MEMORY if over else NO_MEMORY_ABOVE
        child.start_by = min(child.start_by, self._looks)
        self._replies.fail_when_cleared(child)
        self._jobs.forget(child)

    # --- starts that wait -------------------------------------------------------------------

    def _is_late(self, job: int) -> bool:
        return any(request.job == job for _, request, _ in self._late)

    def _start_late(self) -> None:
        """Start what waits for a slot, as far as slots are free."""
        while self._late and not self._supply.must_wait(self._late[0][1].order):
            number, request, by = self._late.popleft()
            try:
                self._start(number, request, by)
            except (OSError, JobworkerError) as error:
                self._tell({"id": number, "error": problem(SPAWN.step, error)}, ())
            except Exception:  # noqa: BLE001 - recorded; without a reply the service waits for ever
                self._tell({"id": number, "error": fault(self._event_loop.record("Spawn"))}, ())

    def _refuse_late(
        self, applies: Callable[[requests.Spawn, int], bool], why: channel.Message
    ) -> None:
        for late in [each for each in self._late if applies(each[1], each[2])]:
            if late in self._late:  # else an earlier `_tell` found that the service has gone
                self._late.remove(late)
                self._tell({"id": late[0], "error": why}, ())

    # --- starts that are given up -----------------------------------------------------------

    def give_up(self, job: int) -> bool:
        """Give up the start of a job. Returns False if it has no start or its program runs.

        The launcher refuses the spawn as soon as nothing of the start is left.
        """
        if self._is_late(job):
            self._refuse_late(lambda request, _: request.job == job, GIVEN_UP)
            return True
        child = self._jobs.find(job)
        return child is not None and self._give_up_child(child, GIVEN_UP)

    def undo_all(self) -> None:
        """Give up all starts that are under way, because the service that asked for them has gone.

        Their failures are reported to no one.
        """
        self._late.clear()
        self._jobs.forget_listeners()
        for child in list(self._jobs.children):
            if child.request is not None:
                # Before `_undo`: that may be repeated later, and by then the next service
                # may have used the same request number.
                child.request = NOBODY
                self._event_loop.call_with_retries(partial(self._undo, child))

    def _undo(self, child: Child) -> None:
        if self._give_up_child(child, GIVEN_UP):
            child.request = None
            self._jobs.forget(child)

    def _give_up_child(self, child: Child, why: channel.Message) -> bool:
        """Kill a child that is starting. Returns False if its program runs: then it goes on.

        `why` is the reason for the service; it states that the program was not executed. If that is
        not certain, the launcher reports `MAY_HAVE_RUN` instead, so no service repeats the start.
        """
        if child.request is None:
            return False
        is_held = child.pidfd < 0 or held_starts.hold(child)
        try:
            if child.sock is not None:
                self._messages.read(child)  # finds out whether the program was executed meanwhile
        finally:
            if child.request is None and child.pidfd >= 0:
                held_starts.go_on(child)
        if child.request is None:
            return False
        if child.failure is None:
            child.failure = why if is_held else MAY_HAVE_RUN
            if not is_held and child.job is not None:
                self._jobs.forget_unstarted(child.job)
        child.start_by = min(child.start_by, self._looks)
        self._jobs.kill(child)
        return True

    def _look_at_starts(self) -> None:
        """Give up starts that take too long, and report those that cannot be cleared away."""
        self._looks += 1
        self._refuse_late(
            lambda _, by: by <= self._looks, too_long("no place became free", START_SECONDS)
        )
        starting = [child for child in self._jobs.children if child.request is not None]
        patience = round(GIVE_UP_SECONDS / LOOK_AT_STARTS_SECONDS)
        for child in starting:
            if child.start_by + patience <= self._looks:
                self._abandon(child)
            elif child.start_by <= self._looks and child.failure is None:
                held = "its program was not executed" if child.ready else "its sandbox was not made"
                self._give_up_child(child, too_long(held, START_SECONDS))
        if starting or self._late:
            self._event_loop.call_later(LOOK_AT_STARTS_SECONDS, self._look_at_starts)

    def _abandon(self, child: Child) -> None:
        """Report that a start has failed although something of it is left: its slot stays taken."""
        log_line(f"{child.slot.name} cannot be cleared away: its start failed: {child.failure}")
        self._replies.fail(child, None)
        self._jobs.forget(child)
