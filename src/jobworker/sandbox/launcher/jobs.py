"""The launcher's jobs and spares, each from its clone until all its resources are released.

The launcher keeps spares ready. `spawn` turns a spare into a job, or makes a child if no spare is
left. The event loop watches each child: its messages, its end, and the OOM events of its scope.
`tell` sends three kinds of messages to the service: the reply to a spawn, the event that a job has
ended, and the event that a job's network has ended before the job. The reply to a spawn is sent
when the program runs, or when nothing of the failed start is left.

The event of an end names the writes that the job lost (`disk.images.lost_writes`). For the job's
own disk the launcher knows this at once. A volume is first written out by a process of its own, so
the event waits until such a process was available and has finished.

An end has two halves. The launcher releases what a job held (disk, mounts, scope, range of ids,
scratch) as soon as the job has ended, whether or not a service is connected. It keeps the exit
status and the pipes until the service asks to `remove` the job.

What must hold: nothing here waits for a child, for a file system that a job can slow down or for
the kernel's locks on control groups. The fork server makes children and removes what they leave.
Between the request for a child and its clone, the child has its slot and its job but no process.
A child is cleared away only after its exit status was read. `remove` is answered when the job's
slot is free. If no slot is free but some are about to become free, a start waits for one.

Standard library only.
"""

import contextlib
import errno
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from jobworker.errors import JobworkerError, ProtocolError, SandboxError
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.launcher import held_starts
from jobworker.sandbox.launcher.child import (
    NOBODY,
    Child,
    ChildExit,
    PendingStart,
    status_of,
)
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.host_names import following
from jobworker.sandbox.launcher.kernel_watch import KernelWatch
from jobworker.sandbox.launcher.oom_watch import OomWatch
from jobworker.sandbox.launcher.reports import (
    DIED,
    GIVEN_UP,
    MAY_HAVE_RUN,
    NO_MEMORY_ABOVE,
    TOO_FEW_DESCRIPTORS,
    TOO_LITTLE_MEMORY,
    Tell,
    fault,
    how_ended,
    measured,
    problem,
    since_end,
    too_long,
)
from jobworker.sandbox.launcher.volume_losses import VolumeLosses
from jobworker.sandbox.launcher.walls import Walls
from jobworker.sandbox.launcher.zombies import Zombies
from jobworker.sandbox.log import log_line
from jobworker.sandbox.network import gateway
from jobworker.sandbox.network.modes import room_beside
from jobworker.sandbox.protocol import events, requests
from jobworker.sandbox.protocol.operations import SPAWN, answer
from jobworker.sandbox.protocol.replies import Spawned
from jobworker.sandbox.start import trampoline
from jobworker.sandbox.start.plan import Order, finish, fits_spare

REFILL_SECONDS = 0.02
"""The delay between the use of a spare and the making of the next one.

To make it at once would slow down the start that has taken the spare."""
START_SECONDS = 30.0
"""The launcher gives up a start that takes longer, since the cause may never go away."""
GIVE_UP_SECONDS = 3.0
"""How long the launcher waits for a failed start to be cleared away before it reports the failure.
"""
LOOK_AT_STARTS_SECONDS = 0.5
"""The period of `_look_at_starts`. The age of a start is counted in these periods, not in seconds
of the clock: a launcher that was itself stopped for a while then gives no start up."""
LOOK_AGAIN_SECONDS = 0.1
"""The pause before the launcher checks again for an end that it cannot watch or read yet."""
TOGETHER_SECONDS = 0.1
"""If a whole control group is killed, a job and its gateway end at most this far apart."""
_ENDED = (ProcessLookupError, BrokenPipeError, ConnectionResetError)
"""The errors of a call for a child that has just ended."""
UNSTARTED_KEPT = 1000
"""How many starts the launcher remembers: their ids fit in one packet with a page of jobs."""


class Jobs:
    """All children of the launcher."""

    def __init__(self, pool: ChildPool, spares: int, tell: Tell, locks: int) -> None:
        event_loop = pool.event_loop
        self._event_loop, self._pool, self._tell = event_loop, pool, tell
        self._wanted_spares = spares
        self._children: set[Child] = set()
        self._spares: deque[Child] = deque()
        self._making: deque[Child] = deque()
        """Spares that the fork server has been asked for and that have no process yet."""
        self._jobs: dict[int, Child] = {}
        self._late: deque[tuple[int, requests.Spawn, int]] = deque()
        """Starts that wait for the slot of an ended child: the number of the request, the request,
        and the value of `_looks` at which the launcher gives the start up."""
        self._unstarted: dict[int, None] = {}
        """Jobs whose start was requested and whose program has certainly not run."""
        self._looks = 0
        """How often `_look_at_starts` has run."""
        self._untold: set[Child] = set()
        """Cleared children whose `when_cleared` has not returned yet."""
        self._usual_limits = ScopeLimits()
        """The limits of the latest job. Spares get them in advance: most jobs ask for the same."""
        self._zombies = Zombies(event_loop)
        self._losses = VolumeLosses(pool, self._tell_end)
        self._walls = Walls(event_loop, pool.networks, self._children, tell)
        self._oom_watch = OomWatch(event_loop, self.kill)
        self._kernel_watch = KernelWatch(
            event_loop, pool.forks, pool.slots, self._running, self.kill, locks
        )
        event_loop.call_later(0, self._refill)

    @property
    def nothing_left(self) -> bool:
        """Whether all children are cleared away, and all removal of their resources is done."""
        return not self._children and self._pool.is_idle

    def find(self, job: int) -> Child | None:
        """The child that is this job, or None if there is none."""
        return self._jobs.get(job)

    def started_after(self, job: int) -> list[Child]:
        """The jobs with higher ids whose program was started, in the order of their ids.

        Jobs that have ended are included.
        """
        return [
            child
            for number, child in sorted(self._jobs.items())
            if number > job and child.request is None
        ]

    @property
    def unstarted(self) -> list[int]:
        """The latest jobs whose start was requested and whose program was not executed."""
        return list(self._unstarted)

    def _running(self) -> dict[int, Child]:
        return {job: child for job, child in self._jobs.items() if child.is_alive}

    def promised_bytes(self) -> int:
        """The bytes of the host's disk that jobs' disks may still take.

        Counts the disks of jobs and spares, if they are overcommitted, and jobs' thin volumes.
        """
        disks = [
            child.disk.root
            for child in self._children
            if child.disk is not None and self._pool.overcommits
        ]
        thin = {
            name: root
            for child in self._children
            for name, root in child.volume_roots.items()
            if name in child.thin_volumes
        }
        return sum(disk_images.may_still_take(root) for root in (*disks, *thin.values()))

    def undo_starts(self) -> None:
        """Give up all starts that are under way, because the service that asked for them has gone.

        Their failures are reported to no one.
        """
        self._late.clear()
        for child in self._untold:
            child.when_cleared = child.request = None
        self._untold.clear()
        for child in list(self._children):
            child.when_cleared = None
            if child.request is not None:
                # Before `_undo_start`: that may be repeated later, and by then the next service
                # may have used the same request number.
                child.request = NOBODY
                self._event_loop.call_with_retries(partial(self._undo_start, child))

    def _undo_start(self, child: Child) -> None:
        if self._give_up(child, GIVEN_UP):
            child.request = None
            self._forget(child)

    def end_all(self) -> None:
        """Kill every child, forget every job and make no spare any more."""
        self._wanted_spares = 0
        self._event_loop.cancel(self._refill)
        self._late.clear()
        for child in [*self._children, *self._jobs.values()]:
            self.remove(child)

    # --- from spare to job ------------------------------------------------------------------

    def spawn(self, number: int, request: requests.Spawn) -> None:
        """Start a job. The reply to request `number` is sent later, by `tell`.

        Raises OSError or JobworkerError if the start cannot be tried. Nothing is left of it then.
        """
        if request.job in self._jobs or self._is_late(request.job):
            raise SandboxError(
                "the job's id is in use", data={"step": "job", "errno": errno.EEXIST}
            )
        self._unstarted.pop(request.job, None)
        self._unstarted[request.job] = None
        if len(self._unstarted) > UNSTARTED_KEPT:
            del self._unstarted[next(iter(self._unstarted))]
        if len(self._jobs) + len(self._late) >= self._pool.slots:
            raise SandboxError(
                "every place is in use, by jobs that were not removed", data={"step": "place"}
            )
        if not self._event_loop.is_scheduled(self._look_at_starts):
            self._event_loop.call_later(LOOK_AT_STARTS_SECONDS, self._look_at_starts)
        by = self._looks + round(START_SECONDS / LOOK_AT_STARTS_SECONDS)
        if self._late or self._must_wait(request.order):
            self._late.append((number, request, by))
        else:
            self._start(number, request, by)

    def _is_late(self, job: int) -> bool:
        return any(request.job == job for _, request, _ in self._late)

    def give_up_start(self, job: int) -> bool:
        """Give up the start of a job. Returns False if it has no start or its program runs.

        The launcher refuses the spawn as soon as nothing of the start is left.
        """
        if self._is_late(job):
            self._refuse_late(lambda request, _: request.job == job, GIVEN_UP)
            return True
        child = self._jobs.get(job)
        return child is not None and self._give_up(child, GIVEN_UP)

    def _give_up(self, child: Child, why: channel.Message) -> bool:
        """Kill a child that is starting. Returns False if its program runs: then it goes on.

        `why` is the reason for the service; it states that the program was not executed. If that is
        not certain, the launcher reports `MAY_HAVE_RUN` instead, so no service repeats the start.
        """
        if child.request is None:
            return False
        is_held = child.pidfd < 0 or held_starts.hold(child)
        try:
            if child.sock is not None:
                self._on_word(child)  # finds out whether the program was executed meanwhile
        finally:
            if child.request is None and child.pidfd >= 0:
                held_starts.go_on(child)
        if child.request is None:
            return False
        if child.failure is None:
            child.failure = why if is_held else MAY_HAVE_RUN
            if not is_held and child.job is not None:
                self._unstarted.pop(child.job, None)
        child.start_by = min(child.start_by, self._looks)
        self.kill(child)
        return True

    def _look_at_starts(self) -> None:
        """Give up starts that take too long, and report those that cannot be cleared away."""
        self._looks += 1
        self._refuse_late(
            lambda _, by: by <= self._looks, too_long("no place became free", START_SECONDS)
        )
        starting = [child for child in self._children if child.request is not None]
        patience = round(GIVE_UP_SECONDS / LOOK_AT_STARTS_SECONDS)
        for child in starting:
            if child.start_by + patience <= self._looks:
                self._abandon(child)
            elif child.start_by <= self._looks and child.failure is None:
                held = "its program was not executed" if child.ready else "its sandbox was not made"
                self._give_up(child, too_long(held, START_SECONDS))
        if starting or self._late:
            self._event_loop.call_later(LOOK_AT_STARTS_SECONDS, self._look_at_starts)

    def _refuse_late(
        self, applies: Callable[[requests.Spawn, int], bool], why: channel.Message
    ) -> None:
        for late in [each for each in self._late if applies(each[1], each[2])]:
            if late in self._late:  # else an earlier `_tell` found that the service has gone
                self._late.remove(late)
                self._tell({"id": late[0], "error": why}, ())

    def _abandon(self, child: Child) -> None:
        """Report that a start has failed although something of it is left: its slot stays taken."""
        log_line(f"{child.slot.name} cannot be cleared away: its start failed: {child.failure}")
        self._tell_failure(child, None)
        self._forget(child)

    def _must_wait(self, order: Order) -> bool:
        """Whether a start has to wait for a slot: none is free, but an ended child will free one.

        A start that can use a spare needs no free slot.
        """
        if self._pool.has_room():
            return False
        is_usual = fits_spare(order, self._pool.usual_disk_bytes)
        if is_usual and (self._spares or self._making):
            return False
        return any(child.doomed for child in self._children)

    def _start_late(self) -> None:
        while self._late and not self._must_wait(self._late[0][1].order):
            number, request, by = self._late.popleft()
            try:
                self._start(number, request, by)
            except (OSError, JobworkerError) as error:
                self._tell({"id": number, "error": problem(SPAWN.step, error)}, ())
            except Exception:  # noqa: BLE001 - recorded; without a reply the service waits for ever
                self._tell({"id": number, "error": fault(self._event_loop.record("Spawn"))}, ())

    def _start(self, number: int, request: requests.Spawn, by: int) -> None:
        start = PendingStart(number, request, trampoline.exec_image(*finish(request.order)), by)
        if not self._event_loop.is_scheduled(self._refill):
            self._event_loop.call_later(REFILL_SECONDS, self._refill)
        if not fits_spare(request.order, self._pool.usual_disk_bytes):
            self._make(request.order, start)
            return
        while self._spares:
            spare = self._take_spare(request.order.hostname)
            if spare.root is not None and disk_images.lost_writes(spare.root):
                self.kill(spare)
                continue
            if spare.has_ended():
                log_line("a spare is lost: it has ended while it waited")
                continue
            try:
                self._order(spare, start)
            except OSError as error:
                log_line(f"a spare is lost: {error}")
            else:
                self._become(spare, start)
                return
        if self._making:
            spare = self._making.popleft()
            self._become(spare, start)
            spare.start = start
        elif self._must_wait(request.order):  # for the slots of the spares that were killed above
            self._late.appendleft((number, request, by))
        else:
            self._make(None, start)

    def _take_spare(self, hostname: str) -> Child:
        """Take the spare that has this host name, or else the oldest one."""
        named = (each for each in self._spares if each.host_name == hostname)
        spare = next(named, self._spares[0])
        self._spares.remove(spare)
        return spare

    def plan(self, request: requests.PlanOf) -> list[tuple[str, str, str]]:
        """The steps of a start, as `steps.explain` describes them.

        Raises the error with which that start would be refused.
        """
        return self._pool.plan(request.order, request.limits)

    def _order(self, child: Child, start: PendingStart) -> None:
        """Set a child's limits and send it its order.

        If it does not have its host name yet, it first gets that, and `_on_named` sends the order.
        If that fails, the child is killed, then cleared like any other, and the error is raised.
        """
        request, names = start.request, self._pool.host_names
        try:
            child.scope.arm(room_beside(request.limits, request.order))
            self._usual_limits = request.limits
            if child.host_name == request.order.hostname:
                child.send(start.exec_image)
                return
            names.next = following(request.order.hostname)
            names.set(child.pidfd, request.order.hostname, partial(self._on_named, child, start))
        except Exception:
            self.kill(child)
            raise

    def _on_named(self, child: Child, start: PendingStart, outcome: channel.Message) -> None:
        """Send a child its order, unless it was killed or has ended while its name was set.

        It may also end now. Then its own message, read at its end, has the reason.
        """
        if child.doomed:
            return
        try:
            if "errno" in outcome:
                code = outcome["errno"]
                assert isinstance(code, int)
                raise OSError(code, f"cannot set the host name: {os.strerror(code)}")
            child.send(start.exec_image)
        except OSError as error:
            if not isinstance(error, _ENDED):
                child.failure = child.failure or problem(SPAWN.step, error)
            self.kill(child)

    def _become(self, child: Child, start: PendingStart) -> None:
        """Record which job a child is to become, and the request that its start answers."""
        job = start.request.job
        self._jobs[job] = child
        child.job, child.request, child.start_by = job, start.number, start.by

    def _make(self, order: Order | None, start: PendingStart | None = None) -> Child:
        """Ask the fork server for a child, for a start or as a spare."""
        child = self._pool.make(order, self._on_made)
        self._children.add(child)
        if start is not None:
            self._become(child, start)
            child.start = start
        return child

    def _on_made(self, child: Child, failure: channel.Message | None) -> None:
        """Handle the fork server's answer: the child has a process, or none could be made."""
        start, child.start = child.start, None
        is_spare = child in self._making
        if is_spare:
            self._making.remove(child)
        if failure is not None and child.pidfd < 0:
            self._end_unmade(child, failure)
            return
        child.failure = child.failure or failure  # an earlier try of this call may have raised
        child.doomed = child.doomed or failure is not None
        try:
            self._watch(child)
        except OSError as error:  # epoll(7) has no memory, or its limit on watches is reached
            child.failure = child.failure or problem(SPAWN.step, error)
            child.doomed = True
            self._look_for_ends(child)
        if child.doomed:  # its start was given up, or the job removed, before it had a process
            if child.request is not None:
                child.failure = child.failure or GIVEN_UP
            self.kill(child)
        elif start is not None:
            self._order_new(child, start)
        elif is_spare:
            self._spares.append(child)
            self._event_loop.call_later(0, self._refill)

    def _order_new(self, child: Child, start: PendingStart) -> None:
        """Give the order to a child that was made for this start."""
        try:
            self._order(child, start)
        except (OSError, JobworkerError) as error:
            child.failure = child.failure or problem(SPAWN.step, error)
        except Exception:  # noqa: BLE001 - recorded; without a reply the service waits for ever
            child.failure = fault(self._event_loop.record("Spawn"))

    def _end_unmade(self, child: Child, why: channel.Message) -> None:
        """Fail the start of a child that could not be made, and free its slot."""
        child.exit, child.doomed, child.end_is_taken = ChildExit(None, None), True, True
        child.failure = child.failure or {"step": SPAWN.step, **why}
        if child.request is not None:
            child.when_cleared = partial(self._tell_failure, child, child.when_cleared)
        elif child.job is None:
            # The next start tries again, and its reply has the reason if it fails too.
            log_line(f"cannot keep a spare: {why}")
        self._forget(child)
        self._event_loop.call_with_retries(partial(self._clear, child))

    def _watch(self, child: Child) -> None:
        assert child.sock is not None
        self._event_loop.watch(child.pidfd, partial(self._on_exit, child))
        if child.gateway is not None:
            self._event_loop.watch(child.gateway, partial(self._on_gateway_exit, child))
        self._event_loop.watch(child.sock.fileno(), partial(self._on_word, child))
        self._oom_watch.watch(child)

    def _look_for_ends(self, child: Child) -> None:
        """Check without waiting for the ends of a child and its gateway that epoll does not watch.

        Repeats itself every `LOOK_AGAIN_SECONDS` until both have ended.
        """
        unwatched = False
        for pidfd, on_end in (
            (child.gateway, self._on_gateway_exit),
            (child.pidfd if child.exit is None else None, self._on_exit),
        ):
            if pidfd is None or self._event_loop.watches(pidfd):
                continue
            if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                unwatched = True
            else:
                on_end(child)
        if unwatched:
            self._event_loop.call_later(LOOK_AGAIN_SECONDS, partial(self._look_for_ends, child))

    def _refill(self) -> None:
        """Ask for one spare, if more are wanted. `_on_made` asks for the next one."""
        ready = len(self._spares) + len(self._making)
        if ready >= self._wanted_spares or self._making or not self._pool.has_room():
            return
        try:
            self._making.append(self._make(None))
        except (OSError, JobworkerError) as error:
            log_line(f"cannot keep a spare: {error}")

    # --- messages and ends of children ------------------------------------------------------

    def _on_word(self, child: Child) -> None:
        """Read a child's socket: it has messages, or its end (execve(2) or the child's death)."""
        assert child.sock is not None
        try:
            while (message := child.hear()) is not None:
                failure = message.get("failed")
                if isinstance(failure, dict):
                    child.failure = failure
                elif "ready" in message:
                    child.ready = True
                    if child in self._spares:
                        child.scope.arm_ahead(self._usual_limits)
                        self._pool.host_names.name_ahead(child)
        except BlockingIOError:
            if child.exit is None:
                return
        except (ProtocolError, OSError) as error:
            cut = isinstance(error, channel.DescriptorsLost)
            child.failure = child.failure or (TOO_FEW_DESCRIPTORS if cut else DIED)
            self.kill(child)  # it may have its order already, and would execute its program
            if isinstance(error, channel.BadMessage):
                self._pool.sweepers.close(error.descriptors)
        if not child.ready or child.order >= 0:  # it had no order, so it cannot have executed
            child.failure = child.failure or DIED
        self._event_loop.unwatch(child.sock.fileno())
        child.sock.close()
        child.sock = None
        if child in self._spares:
            self._spares.remove(child)
        if child.failure is None and child.job is not None and child.request is not None:
            request, child.request, child.started_at = child.request, None, time.monotonic()
            self._unstarted.pop(child.job, None)
            word = answer(SPAWN, Spawned(child.pid))
            self._answer(request, word, (child.stdout, child.stderr))
            self._kernel_watch.wake()
            self._event_loop.call_with_retries(partial(self._walls.build, child))

    def _on_exit(self, child: Child) -> None:
        how = status_of(child)
        self._event_loop.unwatch(child.pidfd)
        if how is None:
            self._event_loop.call_later(LOOK_AGAIN_SECONDS, partial(self._look_for_ends, child))
            return
        child.exit, child.ended_at, child.doomed = how, time.monotonic(), True
        self._zombies.add(child.pidfd)
        self._event_loop.call_with_retries(partial(self._take_end, child))

    def _take_end(self, child: Child) -> None:
        """Read an ended child's last messages, report its end, and release what it held."""
        child.final_want = child.want()
        try:
            child.final_usage = child.usage()
        except OSError as error:
            log_line(f"cannot read what {child.slot.name} has used: {error}")
        if child.gateway is not None:
            signal.pidfd_send_signal(child.gateway, signal.SIGKILL)
        if child.sock is not None:  # its last messages were sent before it ended
            self._on_word(child)
        if child.request is not None:  # the start failed: report it once nothing of it is left
            if child.final_want and child.failure is not MAY_HAVE_RUN:
                over = child.final_want == "limit"
                child.failure = TOO_LITTLE_MEMORY if over else NO_MEMORY_ABOVE
            child.start_by = min(child.start_by, self._looks)
            child.when_cleared = partial(self._tell_failure, child, child.when_cleared)
            self._forget(child)
        elif child.job is None:
            if child.failure is not None and child.order >= 0:  # a spare without an order
                log_line(f"a spare failed: {child.failure}")
            self._forget(child)
        else:
            if child.root is not None and disk_images.lost_writes(child.root):
                child.lost = [""]
            self._losses.find(child)
        child.end_is_taken = True
        self._event_loop.call_with_retries(partial(self._clear, child))

    def _tell_failure(self, child: Child, removed: Callable[[], None] | None) -> None:
        if child.request is not None:  # else it was reported already, or its service has gone
            self._answer(child.request, {"error": child.failure or DIED})
            child.request = None
        if removed is not None:  # a `remove` came while it started
            removed()

    def _answer(self, request: int, word: channel.Message, descriptors: Sequence[int] = ()) -> None:
        """Answer the request for a start, if its service is still connected."""
        if request != NOBODY:
            self._tell({"id": request, **word}, descriptors)

    def _tell_end(self, child: Child) -> None:
        child.end_is_known = True
        if child.job is not None:
            ended = events.JobEnded(child.job, since_end(child), how_ended(child), *measured(child))
            self._tell(events.message_of(ended), ())

    def _on_gateway_exit(self, child: Child) -> None:
        assert child.gateway is not None
        self._event_loop.unwatch(child.gateway)
        how = gateway.reap(child.gateway)
        if how is None:
            self._event_loop.call_later(LOOK_AGAIN_SECONDS, partial(self._look_for_ends, child))
            return
        child.gateway = None
        if child.exit is None:
            self._event_loop.call_later(TOGETHER_SECONDS, partial(self._walls.tell_end, child, how))
        if child.exit is not None:
            self._event_loop.call_with_retries(partial(self._clear, child))

    # --- the end ----------------------------------------------------------------------------

    def kill(self, child: Child) -> None:
        """Send SIGKILL to all processes of a child, unless its first process has ended."""
        if child.exit is not None:
            return
        child.doomed = True
        if child.pidfd >= 0:  # else `_on_made` kills it
            # When the first process dies, the kernel kills its PID namespace. The kill of the
            # scope also reaches processes that have not entered that namespace yet.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            self._pool.scopes.kill(child.scope.name)

    def remove(self, child: Child, done: Callable[[], None] | None = None) -> None:
        """Kill a job if it has not ended, and forget it.

        `done` is called when the job's slot is free: the service may then start the next job.
        """
        child.when_cleared = done or child.when_cleared
        self._forget(child)
        if child.exit is None:  # it is cleared away when it has ended
            self.kill(child)
        elif child not in self._children:
            self._tell_cleared(child)

    def _clear(self, child: Child) -> None:
        """Release what an ended child held; its scope follows when the kernel no longer uses it."""
        if child not in self._children or not child.end_is_taken or child.is_clearing:
            return
        self._oom_watch.forget(child)
        if child.gateway is None:  # else this is called again when the gateway has ended
            self._pool.clear(child, partial(self._on_cleared, child))
            child.is_clearing = True
        self._pool.discard_disk(child)

    def _on_cleared(self, child: Child) -> None:
        self._children.discard(child)  # its slot is free, even if a step below fails
        if not child.inspected:
            self._event_loop.call_with_retries(partial(self._pool.release_volumes, child))
        self._untold.add(child)
        self._event_loop.call_with_retries(partial(self._tell_cleared, child))
        self._event_loop.call_with_retries(self._start_late)

    def _tell_cleared(self, child: Child) -> None:
        if child.when_cleared is not None:
            child.when_cleared()
            child.when_cleared = None
        self._untold.discard(child)

    def _forget(self, child: Child) -> None:
        """Drop a job's id and exit status, and close its pipes."""
        if child.job is not None:
            self._jobs.pop(child.job, None)
            child.job = None
        self._pool.close_pipes(child)
