"""The launcher's jobs and spares, each from its clone until nothing of it is left.

Spares are kept ready; `spawn` turns one into a job, or makes a child where none is left. Each
child is watched: its last words, its end, its memory. What must be told goes to `tell`: the
reply to a spawn once the program runs or nothing of the failed start is left, and the events of
a job's end and of its network's, where that comes first.

An end is told with what the job lost of what it wrote (`disk.images.lost_writes`). That of its own
disk is known at once; a volume is written out before, by a process of its own, and the end is told
once the system has given one.

An end has two halves. What a job held (disk, mounts, scope, range of ids, scratch) goes as soon
as it has ended, whatever becomes of its record and whether or not a service is there. Its exit
status and its pipes stay until the service asks to `remove` it.

What must hold: nothing here waits for a child or for a file system that a job can slow down. A
child is cleared away only after it was reaped; a scope that the kernel is still busy with is tried
again. `remove` is answered when the job's place is free, and a start that finds the last places
about to become free waits for one.

Standard library only.
"""

import contextlib
import errno
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from jobworker.errors import JobworkerError, ProtocolError, SandboxError
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.hierarchy import Limits, Usage
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.launcher import held_starts
from jobworker.sandbox.launcher.child import NOBODY, Child, name_host, status_of
from jobworker.sandbox.launcher.children import Nursery
from jobworker.sandbox.launcher.kernel_watch import KernelWatch
from jobworker.sandbox.launcher.oom_watch import OomWatch
from jobworker.sandbox.launcher.zombies import Zombies
from jobworker.sandbox.log import say
from jobworker.sandbox.network import gateway
from jobworker.sandbox.network.modes import room_beside
from jobworker.sandbox.protocol import events, requests
from jobworker.sandbox.protocol.asks import Ask, Asked
from jobworker.sandbox.protocol.operations import SPAWN, answer
from jobworker.sandbox.protocol.replies import HowEnded, JobEntry, Spawned
from jobworker.sandbox.start import trampoline, wall
from jobworker.sandbox.start.plan import Order, finish, fits_spare

REFILL_SECONDS = 0.02
"""A spare is made this long after one was taken: at once would slow the start that took it."""
START_SECONDS = 30.0
"""A start that takes longer is given up: what holds it may hold it for ever."""
GIVE_UP_SECONDS = 3.0
"""How long what is left of a failed start may delay the word of that."""
LOOK_AT_STARTS_SECONDS = 0.5
"""The time of a start is counted in looks: a launcher that was stopped itself gives nothing up."""
LOOK_AGAIN_SECONDS = 0.1
TOGETHER_SECONDS = 0.1
"""A kill of a whole control group ends a job and its gateway at most this far apart."""
UNSTARTED_KEPT = 1000
"""Starts that are remembered: their ids fit a packet, with a page of jobs."""
CLEAR_AGAIN_SECONDS = 0.005
CLEAR_SELDOM_SECONDS = 0.08
"""The pause doubles up to this, while none of those that are tried again lets go."""
SWEEP_AGAIN_SECONDS = 0.5
INSPECT_AGAIN_SECONDS = 0.1
MAX_INSPECTIONS = 20
"""Of those that began: a process that is killed each time is not started for ever."""
_DIED: channel.Message = {"step": "prepare", "errno": 0, "detail": "the process ended"}
_TOO_FEW_DESCRIPTORS: channel.Message = {
    "step": "prepare",
    "errno": errno.EMFILE,
    "detail": "the launcher takes what its process has made by descriptors",
}
_TOO_LITTLE_MEMORY: channel.Message = {
    "step": "limits",
    "errno": errno.ENOMEM,
    "detail": "the memory limit leaves no room for a start",
}
_NO_MEMORY_ABOVE: channel.Message = {
    "step": "memory",
    "errno": errno.ENOMEM,
    "detail": "the host, or a control group above the job's, has none left",
}

_GIVEN_UP: channel.Message = {
    "step": "start",
    "errno": errno.ECANCELED,
    "detail": "its start was given up, and its program was not executed",
}
_MAY_HAVE_RUN: channel.Message = {
    "step": "start",
    "errno": errno.ETIMEDOUT,
    "detail": "its start was given up; its program may have begun to run",
}

_HEEDED = (b"SigBlk:", b"SigIgn:", b"SigCgt:")

Tell = Callable[[channel.Message, Sequence[int]], None]


class Jobs:
    """All children of the launcher."""

    def __init__(self, turns: Turns, nursery: Nursery, spares: int, tell: Tell, locks: int) -> None:
        self._turns, self._nursery, self._tell = turns, nursery, tell
        self._wanted_spares = spares
        self._children: set[Child] = set()
        self._spares: deque[Child] = deque()
        self._jobs: dict[int, Child] = {}
        self._late: deque[tuple[int, requests.Spawn, int]] = deque()
        """Starts that wait for a place which an ended child still has, and until which look."""
        self._unstarted: dict[int, None] = {}
        """Jobs that were to be started and whose program has surely not run, so far or at all."""
        self._looks = 0
        self._untold: set[Child] = set()
        """Cleared children whose `when_cleared` has not returned yet."""
        self._uncleared: set[Child] = set()
        self._clear_pause = CLEAR_AGAIN_SECONDS
        """Ended children whose scope could not be removed yet; tried again."""
        self._usual_limits = Limits()
        """Those of the latest job: spares are put under them, and most jobs ask for the same."""
        self._zombies = Zombies(turns)
        self._inspectors = Chores(turns, at_once=nursery.slots, waiting=0)
        self._lacks_inspectors = False
        """Whether the latest one could not be started; the log was told then."""
        self._oom_watch = OomWatch(turns, self.kill)
        self._kernel_watch = KernelWatch(turns, nursery.slots, self._running, self.kill, locks)
        turns.call_in(0, self._refill)
        turns.watch(nursery.networks.changes.fileno(), self._on_addresses)
        self._watch_sweepers()

    @property
    def nothing_left(self) -> bool:
        """Whether no child is left, and nothing that removes files of one."""
        return not self._children and not self._nursery.sweepers.running

    def find(self, job: int) -> Child | None:
        """The child that is a job."""
        return self._jobs.get(job)

    def started_after(self, job: int) -> list[Child]:
        """The jobs with higher ids whose program was started, by id, those that ended included."""
        return [
            child
            for number, child in sorted(self._jobs.items())
            if number > job and child.request is None
        ]

    @property
    def unstarted(self) -> list[int]:
        """The latest jobs that were to be started and whose program was not executed."""
        return list(self._unstarted)

    def _running(self) -> dict[int, Child]:
        return {job: child for job, child in self._jobs.items() if child.exit is None}

    def promised_bytes(self) -> int:
        """How much more the disks of jobs and spares, and jobs' thin volumes, may take."""
        disks = [
            child.disk.root
            for child in self._children
            if child.disk is not None and self._nursery.overcommits
        ]
        thin = {
            name: root
            for child in self._children
            for name, root in child.volume_roots.items()
            if name in child.thin_volumes
        }
        return sum(disk_images.may_still_take(root) for root in (*disks, *thin.values()))

    def undo_starts(self) -> None:
        """End the jobs whose start is under way: nobody is there to be told of it."""
        self._late.clear()
        for child in self._untold:
            child.when_cleared = child.request = None
        self._untold.clear()
        for child in list(self._children):
            child.when_cleared = None
            if child.request is not None:
                # At once: when the rest is tried again, the number may be the next service's.
                child.request = NOBODY
                self._turns.see_through(partial(self._undo_start, child))

    def _undo_start(self, child: Child) -> None:
        if self._give_up(child, _GIVEN_UP):
            child.request = None
            self._forget(child)

    def end_all(self) -> None:
        """End every child, for good."""
        self._wanted_spares = 0
        self._turns.cancel(self._refill)
        try:
            self._nursery.remove_scope_ahead()
        except OSError as error:  # the next launcher removes what is left
            say(f"cannot remove a control group: {error}")
        self._late.clear()
        for child in [*self._children, *self._jobs.values()]:
            self.remove(child)

    # --- from spare to job ------------------------------------------------------------------

    def spawn(self, number: int, request: requests.Spawn) -> None:
        """Start a job; the reply to request `number` follows.

        Raises OSError or JobworkerError where it cannot even be tried; nothing is left then.
        """
        if request.job in self._jobs or self._is_late(request.job):
            raise SandboxError(
                "the job's id is in use", data={"step": "job", "errno": errno.EEXIST}
            )
        self._unstarted.pop(request.job, None)
        self._unstarted[request.job] = None
        if len(self._unstarted) > UNSTARTED_KEPT:
            del self._unstarted[next(iter(self._unstarted))]
        if len(self._jobs) + len(self._late) >= self._nursery.slots:
            raise SandboxError(
                "every place is in use, by jobs that were not removed", data={"step": "place"}
            )
        if not self._turns.is_set(self._look_at_starts):
            self._turns.call_in(LOOK_AT_STARTS_SECONDS, self._look_at_starts)
        by = self._looks + round(START_SECONDS / LOOK_AT_STARTS_SECONDS)
        if self._late or self._must_wait(request.order):
            self._late.append((number, request, by))
        else:
            self._start(number, request, by)

    def _is_late(self, job: int) -> bool:
        return any(request.job == job for _, request, _ in self._late)

    def give_up_start(self, job: int) -> bool:
        """Kill what is to become a job: False where nothing is, or its program runs.

        The spawn is refused then, as soon as nothing of it is left.
        """
        if self._is_late(job):
            self._refuse_late(lambda request, _: request.job == job, _GIVEN_UP)
            return True
        child = self._jobs.get(job)
        return child is not None and self._give_up(child, _GIVEN_UP)

    def _give_up(self, child: Child, why: channel.Message) -> bool:
        """Kill a child that starts, for a reason which says that its program was not executed.

        Where that is not sure, the start is told as one whose program may have run, and no service
        is told to make it again. False where the program runs: it goes on.
        """
        if child.request is None:
            return False
        is_held = held_starts.hold(child)
        try:
            if child.sock is not None:
                self._on_word(child)  # its program may run by now
        finally:
            if child.request is None:
                held_starts.go_on(child)
        if child.request is None:
            return False
        if child.failure is None:
            child.failure = why if is_held else _MAY_HAVE_RUN
            if not is_held and child.job is not None:
                self._unstarted.pop(child.job, None)
        child.start_by = min(child.start_by, self._looks)
        self.kill(child)
        return True

    def _look_at_starts(self) -> None:
        """Give up starts that take too long, and tell of those that cannot even be ended."""
        self._looks += 1
        self._refuse_late(lambda _, by: by <= self._looks, _too_long("no place became free"))
        starting = [child for child in self._children if child.request is not None]
        patience = round(GIVE_UP_SECONDS / LOOK_AT_STARTS_SECONDS)
        for child in starting:
            if child.start_by + patience <= self._looks:
                self._abandon(child)
            elif child.start_by <= self._looks and child.failure is None:
                held = "its program was not executed" if child.ready else "its sandbox was not made"
                self._give_up(child, _too_long(held))
        if starting or self._late:
            self._turns.call_in(LOOK_AT_STARTS_SECONDS, self._look_at_starts)

    def _refuse_late(
        self, applies: Callable[[requests.Spawn, int], bool], why: channel.Message
    ) -> None:
        for late in [each for each in self._late if applies(each[1], each[2])]:
            if late in self._late:  # else the word of the one before has found the service gone
                self._late.remove(late)
                self._tell({"id": late[0], "error": why}, ())

    def _abandon(self, child: Child) -> None:
        """Tell that a start has failed though something of it is left: its place stays taken."""
        say(f"{child.slot.name} cannot be cleared away: its start failed: {child.failure}")
        self._tell_failure(child, None)
        self._forget(child)

    def _must_wait(self, order: Order) -> bool:
        """Whether an order needs a place, and the last ones are about to become free."""
        if self._nursery.has_room():
            return False
        if self._spares and fits_spare(order, self._nursery.usual_disk_bytes):
            return False
        return any(child.doomed for child in self._children)

    def _start_late(self) -> None:
        while self._late and not self._must_wait(self._late[0][1].order):
            number, request, by = self._late.popleft()
            try:
                self._start(number, request, by)
            except (OSError, JobworkerError) as error:
                self._tell({"id": number, "error": problem(SPAWN.step, error)}, ())
            except Exception:  # noqa: BLE001 - recorded; its sender would wait for ever
                self._tell({"id": number, "error": fault(self._turns.record("Spawn"))}, ())

    def _start(self, number: int, request: requests.Spawn, by: int) -> None:
        errand = trampoline.errand(*finish(request.order))
        if not self._turns.is_set(self._refill):
            self._turns.call_in(REFILL_SECONDS, self._refill)
        if not fits_spare(request.order, self._nursery.usual_disk_bytes):
            self._order_new(self._make(request.order), number, request, errand, by)
            return
        while self._spares:
            spare = self._spares.popleft()
            if spare.root is not None and disk_images.lost_writes(spare.root):
                self.kill(spare)
                continue
            try:
                self._order(spare, number, request, errand, by)
                return
            except OSError as error:  # it has died while it waited
                say(f"a spare is lost: {error}")
        if self._must_wait(request.order):  # for the places of spares that were no good
            self._late.appendleft((number, request, by))
            return
        self._order_new(self._make(), number, request, errand, by)

    def plan(self, request: requests.PlanOf) -> list[tuple[str, str, str]]:
        """The steps of a start, as `plan.explain` tells them. Raises what would refuse it."""
        return self._nursery.plan(request.order, request.limits)

    def _order_new(
        self,
        child: Child,
        number: int,
        request: requests.Spawn,
        errand: trampoline.Errand,
        by: int,
    ) -> None:
        """Have a child that was made for this become the job.

        It may have failed already: then its own words, which come with its end, say why.
        """
        try:
            self._order(child, number, request, errand, by)
        except (ProcessLookupError, BrokenPipeError, ConnectionResetError):
            self._jobs[request.job] = child
            child.job, child.request, child.start_by = request.job, number, by

    def _order(
        self,
        child: Child,
        number: int,
        request: requests.Spawn,
        errand: trampoline.Errand,
        by: int,
    ) -> None:
        """Have a child become the job; if it cannot, it is reaped and cleared like any other."""
        try:
            child.scope.arm(room_beside(request.limits, request.order))
            self._usual_limits = request.limits
            name_host(child, request.order.hostname)
            child.send(errand)
        except Exception:
            self.kill(child)
            raise
        self._jobs[request.job] = child
        child.job, child.request, child.start_by = request.job, number, by

    def _make(self, order: Order | None = None) -> Child:
        try:
            child = self._nursery.make(order)
        finally:  # where it failed, a gateway of it may be on its way out
            self._watch_sweepers()
        self._children.add(child)
        try:
            self._watch(child)
        except OSError:  # of epoll: no memory, or no more watches to be had
            self.kill(child)
            self._look_for_ends(child)
            raise
        return child

    def _watch(self, child: Child) -> None:
        assert child.sock is not None
        self._turns.watch(child.pidfd, partial(self._on_exit, child))
        if child.gateway is not None:
            self._turns.watch(child.gateway, partial(self._on_gateway_exit, child))
        self._turns.watch(child.sock.fileno(), partial(self._on_word, child))
        self._oom_watch.watch(child)

    def _look_for_ends(self, child: Child) -> None:
        """Take a child's end and its gateway's, as far as they are not watched."""
        unwatched = False
        for pidfd, on_end in (
            (child.gateway, self._on_gateway_exit),
            (child.pidfd if child.exit is None else None, self._on_exit),
        ):
            if pidfd is None or self._turns.watches(pidfd):
                continue
            if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                unwatched = True
            else:
                on_end(child)
        if unwatched:
            self._turns.call_in(LOOK_AGAIN_SECONDS, partial(self._look_for_ends, child))

    def _refill(self) -> None:
        """Make one spare, in two turns; more follow, so that requests are served between."""
        if len(self._spares) >= self._wanted_spares or not self._nursery.has_room():
            return
        try:
            if not self._nursery.make_scope_ahead():
                self._spares.append(self._make())
            self._turns.call_in(0, self._refill)
        except (OSError, JobworkerError) as error:
            # The next request tries again and has the reason told to who asked.
            say(f"cannot keep a spare: {error}")

    # --- what children say and how they end -------------------------------------------------

    def _on_word(self, child: Child) -> None:
        """A child has spoken, or has executed its program, or is gone."""
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
        except BlockingIOError:
            if child.exit is None:
                return
        except (ProtocolError, OSError) as error:
            cut = isinstance(error, channel.DescriptorsLost)
            child.failure = child.failure or (_TOO_FEW_DESCRIPTORS if cut else _DIED)
            self.kill(child)  # it may have its order, and would execute its program
            if isinstance(error, channel.BadMessage):
                self._nursery.sweepers.close(error.descriptors)
                self._watch_sweepers()
        if not child.ready:
            child.failure = child.failure or _DIED
        self._turns.unwatch(child.sock.fileno())
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
            self._turns.see_through(partial(self._wall_in, child))

    def _on_exit(self, child: Child) -> None:
        how = status_of(child)
        self._turns.unwatch(child.pidfd)
        if how is None:
            self._turns.call_in(LOOK_AGAIN_SECONDS, partial(self._look_for_ends, child))
            return
        child.exit, child.ended_at, child.doomed = how, time.monotonic(), True
        self._zombies.take(child.pidfd)
        self._turns.see_through(partial(self._take_end, child))

    def _take_end(self, child: Child) -> None:
        """Hear an ended child's last words and tell its end; then what it held goes."""
        child.final_want = child.want()
        try:
            child.final_usage = child.usage()
        except OSError as error:
            say(f"cannot read what {child.slot.name} has used: {error}")
        if child.gateway is not None:
            signal.pidfd_send_signal(child.gateway, signal.SIGKILL)
        if child.sock is not None:  # its last words come before its end
            self._on_word(child)
        if child.request is not None:  # the start failed: tell once nothing of it is left
            if child.final_want and child.failure is not _MAY_HAVE_RUN:
                over = child.final_want == "limit"
                child.failure = _TOO_LITTLE_MEMORY if over else _NO_MEMORY_ABOVE
            child.start_by = min(child.start_by, self._looks)
            child.when_cleared = partial(self._tell_failure, child, child.when_cleared)
            self._forget(child)
        elif child.job is None:
            if child.failure is not None and child.order >= 0:  # it has had no order
                say(f"a spare failed: {child.failure}")
            self._forget(child)
        else:
            if child.root is not None and disk_images.lost_writes(child.root):
                child.lost = [""]
            self._inspect_volumes(child)
        child.end_is_taken = True
        self._turns.see_through(partial(self._clear, child))

    def _tell_failure(self, child: Child, removed: Callable[[], None] | None) -> None:
        if child.request is not None:  # else it was told already, or nobody waits for it
            self._answer(child.request, {"error": child.failure or _DIED})
            child.request = None
        if removed is not None:  # it was told to be, while it started
            removed()

    def _answer(self, request: int, word: channel.Message, descriptors: Sequence[int] = ()) -> None:
        """Answer the request for a start, where its service is still there."""
        if request != NOBODY:
            self._tell({"id": request, **word}, descriptors)

    def _inspect_volumes(self, child: Child) -> None:
        """Find out whether what the job wrote to its volumes is there, and tell its end."""
        if not child.volume_roots:
            self._turns.see_through(partial(self._tell_end, child))
            return
        work = partial(_find_losses, dict(child.volume_roots))
        roots = list(child.volume_roots.values())
        child.inspected = True
        try:
            self._inspectors.start(work, partial(self._on_inspected, child), roots)
        except OSError as error:  # no process to be had: for how long, nobody knows
            if not self._lacks_inspectors:
                say(f"cannot look at the volumes of ended jobs, and tries again: {error}")
            self._lacks_inspectors = True
            if child.job is None:  # removed meanwhile: nobody is told of its end
                self._on_inspected(child, {"lost": []})
            else:
                self._turns.call_in(INSPECT_AGAIN_SECONDS, partial(self._inspect_volumes, child))
            return
        self._lacks_inspectors = False
        child.inspections += 1

    def _on_inspected(self, child: Child, outcome: channel.Message) -> None:
        lost = outcome.get("lost")
        if isinstance(lost, list):
            child.lost += lost
        elif child.inspections < MAX_INSPECTIONS:  # it was killed: that says nothing of the volumes
            self._turns.call_in(INSPECT_AGAIN_SECONDS, partial(self._inspect_volumes, child))
            return
        else:
            child.unseen += child.volume_roots
            say(f"job {child.job}: cannot look at its volumes, and gives up: {outcome}")
        child.inspected = False
        self._turns.see_through(partial(self._nursery.give_back_volumes, child))
        self._turns.see_through(self._watch_sweepers)
        self._turns.see_through(partial(self._tell_end, child))

    def _tell_end(self, child: Child) -> None:
        child.end_is_known = True
        if child.job is not None:
            ended = events.Ended(child.job, _since_end(child), _end(child), *_measured(child))
            self._tell(events.message_of(ended), ())

    def _on_addresses(self) -> None:
        """The host has other addresses: close them to the jobs that have a way out."""
        try:
            changed = self._nursery.networks.refresh()
        except OSError as error:
            say(f"cannot see the host's addresses, and tries again: {error}")
            self._turns.call_in(LOOK_AGAIN_SECONDS, self._on_addresses)
            return
        if changed:
            for child in self._children:
                if child.sock is None:  # `_on_word` looks after one that is not started yet
                    self._wall_in(child)

    def _wall_in(self, child: Child) -> None:
        """Have a started job's wall close what the host answers at now, or end its network."""
        if child.gateway is None or child.layout is None or child.exit is not None:
            return
        program = self._nursery.networks.wall_for(child.layout)
        if program == child.wall:
            return
        try:
            wall.build(child.gateway, program)
            child.wall = program
        except ProcessLookupError:
            return  # it has ended, and its network with it
        except OSError as error:
            child.network_end = f"the host's new addresses could not be closed to it: {error}"
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.gateway, signal.SIGKILL)

    def _on_gateway_exit(self, child: Child) -> None:
        assert child.gateway is not None
        self._turns.unwatch(child.gateway)
        how = gateway.reap(child.gateway)
        if how is None:
            self._turns.call_in(LOOK_AGAIN_SECONDS, partial(self._look_for_ends, child))
            return
        child.gateway = None
        if child.exit is None:
            self._turns.call_in(TOGETHER_SECONDS, partial(self._tell_network_end, child, how))
        if child.exit is not None:
            self._turns.see_through(partial(self._clear, child))

    def _tell_network_end(self, child: Child, how: str) -> None:
        """Tell that a job goes on without its network; a moment later, since all of it may end."""
        if child.exit is None and child.job is not None and not child.doomed:
            why = child.network_end = child.network_end or how
            say(f"job {child.job}: its private network ended: {why}")
            self._tell(events.message_of(events.NetworkEnded(child.job, why)), ())

    # --- the end ----------------------------------------------------------------------------

    def kill(self, child: Child) -> None:
        """SIGKILL everything of a child that has not ended."""
        if child.exit is None:
            child.doomed = True
            # The first process takes its namespace along; the scope catches what is still on
            # its way there.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            with contextlib.suppress(OSError):
                child.scope.kill()

    def remove(self, child: Child, done: Callable[[], None] | None = None) -> None:
        """Forget a job; one that has not ended is killed. `done` is called when its place is free.

        A service that is told so may start the next job at once.
        """
        child.when_cleared = done or child.when_cleared
        self._forget(child)
        if child.exit is None:  # it is cleared away when it has ended
            self.kill(child)
        elif child not in self._children:
            self._tell_cleared(child)

    def _clear(self, child: Child) -> None:
        """Take back what an ended child held, now or in a moment."""
        if child not in self._children or not child.end_is_taken:
            return
        self._oom_watch.forget(child)
        try:
            self._nursery.clear(child)
        except OSError:
            # The kernel is still busy with the last of its processes.
            is_first = child not in self._uncleared and self._clear_pause > CLEAR_AGAIN_SECONDS
            if is_first:
                self._clear_pause = CLEAR_AGAIN_SECONDS
            self._uncleared.add(child)
            if is_first or not self._turns.is_set(self._clear_again):
                self._turns.call_in(self._clear_pause, self._clear_again)
            self._watch_sweepers()
            return
        self._uncleared.discard(child)
        self._children.discard(child)  # whatever becomes of the rest: its place is free
        if not child.inspected:
            self._turns.see_through(partial(self._nursery.give_back_volumes, child))
        self._turns.see_through(self._watch_sweepers)
        self._untold.add(child)
        self._turns.see_through(partial(self._tell_cleared, child))
        self._turns.see_through(self._start_late)

    def _tell_cleared(self, child: Child) -> None:
        if child.when_cleared is not None:
            child.when_cleared()
            child.when_cleared = None
        self._untold.discard(child)

    def _clear_again(self) -> None:
        before = list(self._uncleared)
        self._clear_pause = min(2 * self._clear_pause, CLEAR_SELDOM_SECONDS)
        for child in before:
            self._clear(child)
        if len(self._uncleared) < len(before):
            self._clear_pause = CLEAR_AGAIN_SECONDS

    def _forget(self, child: Child) -> None:
        """Let go of a job's number, its exit status and its pipes."""
        if child.job is not None:
            self._jobs.pop(child.job, None)
            child.job = None
        self._nursery.close_pipes(child)

    def _watch_sweepers(self) -> None:
        for pidfd in self._nursery.sweepers.running:
            if not self._turns.watches(pidfd):
                try:
                    self._turns.watch(pidfd, partial(self._on_sweeper, pidfd))
                except OSError:  # of epoll: no memory, or no more watches to be had
                    self._turns.call_in(SWEEP_AGAIN_SECONDS, self._watch_sweepers)
        if self._nursery.sweepers.stuck:
            self._turns.call_in(SWEEP_AGAIN_SECONDS, self._sweep_again)

    def _sweep_again(self) -> None:
        self._nursery.sweepers.go_on()
        self._watch_sweepers()

    def _on_sweeper(self, pidfd: int) -> None:
        self._turns.unwatch(pidfd)
        if self._nursery.sweepers.reap(pidfd):
            self._turns.see_through(self._nursery.sweepers.go_on)
            self._watch_sweepers()
        else:
            self._turns.call_in(SWEEP_AGAIN_SECONDS, self._watch_sweepers)


def _too_long(held: str) -> channel.Message:
    return {
        "step": "start",
        "errno": errno.ETIMEDOUT,
        "detail": f"{held} within {START_SECONDS:.0f} s",
    }


def listed(child: Child) -> JobEntry:
    """What a service that takes a job over has to know of it, its pipes aside."""
    assert child.job is not None
    usage, measured = _measured(child)
    return JobEntry(
        job=child.job,
        pid=child.pid,
        age_seconds=time.monotonic() - child.started_at,
        ended_seconds_ago=_since_end(child),
        exit=_end(child) if child.end_is_known else None,
        usage=usage,
        measured=measured,
        network_end=child.network_end,
        asked=None if child.asked is None else child.asked.told(time.monotonic()),
    )


def keep_ask(child: Child, ask: Ask | None, number: int, *, at_once: bool = False) -> None:
    """Keep why a live job was sent a signal; `at_once` where only its kill is left to be done."""
    if ask is None or child.exit is not None:
        return
    if at_once:
        ask = ask._replace(kill_in_ms=0)
    now = time.monotonic()
    if child.asked is None:
        child.asked = Asked(ask, now)
    child.asked.add(ask, number, now)


def _measured(child: Child) -> tuple[Usage, bool]:
    """What a job has used, and whether that could be read: earlier services take numbers only."""
    try:
        return child.usage(), True
    except OSError:
        return Usage(), False


def _since_end(child: Child) -> float:
    """How long ago a job ended: its end is told once its volumes were written out."""
    return time.monotonic() - child.ended_at


def _end(child: Child) -> HowEnded:
    assert child.exit is not None
    code, number = child.exit
    return HowEnded(code, number, tuple(child.lost), tuple(child.unseen), child.final_want)


def _find_losses(volumes: Mapping[str, int]) -> channel.Message:
    """In a process of its own: the volumes that have lost writes."""
    return {"lost": [n for n, root in volumes.items() if disk_images.volume_lost_writes(root)]}


def deliver(child: Child, number: int) -> bool:
    """Send a signal to a job's first process; False if that would have no effect of any kind.

    Raises ProcessLookupError for a job that has ended: its process id may be another's by now.

    PID 1 of a namespace is spared every signal that it has no handler for
    (pid_namespaces(7)), where another process would end by the signal's default action. One
    that ignores the signal on purpose has said something, and gets its grace period; one that
    blocks it may be told of it otherwise (signalfd(2)). The masks in proc(5) tell. An init of ours
    waits for all signals (sigwaitinfo(2), which no mask shows) and passes them on. Where the masks
    cannot be read, the signal is sent: a stop is not refused for want of a descriptor.
    """
    if child.exit is not None:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    if child.report < 0 and number not in (signal.SIGKILL, signal.SIGSTOP):
        # As bytes: the first line is the process's name, which may be any.
        with contextlib.suppress(OSError), open(f"/proc/{child.pid}/status", "rb") as status:
            masks = [line.split()[1] for line in status if line.startswith(_HEEDED)]
            if not any(int(mask, 16) >> (number - 1) & 1 for mask in masks):
                return False
    signal.pidfd_send_signal(child.pidfd, number)
    return True


def fault(incident: str) -> channel.Message:
    """A refusal of a request that met an unexpected fault, which the log has by this number."""
    why = f"an unexpected fault; the launcher's log has it as incident {incident}"
    return {"step": "launcher", "errno": 0, "detail": why}


def problem(step: str, error: OSError | JobworkerError) -> channel.Message:
    """A refusal of a request, as the service is told of it; `step` where the error names none."""
    if isinstance(error, OSError):
        return {"step": step, "errno": error.errno or 0, "detail": str(error)}
    code = error.data.get("errno", 0)
    assert isinstance(code, int)
    detail = str(error.data.get("detail", error.message))
    return {"step": str(error.data.get("step", "limits")), "errno": code, "detail": detail}
