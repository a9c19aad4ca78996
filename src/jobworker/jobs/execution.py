"""One job from its admission to its end: the task with the nursery of all that belongs to it.

    spawn ─► RUNNING ─► ┌ output     a pump moves it from the pipes to the spool
                        ├ time-out   ends the job after its time limit
                        ├ ending     signal, grace period, kill
                        └ exit       the launcher reports it; then the others end
            ─► drain ─► seal ─► record ─► remove in the launcher ─► settle

Clients' requests do not run in this task: they call `request_stop` and wait for events. So a
client that disconnects, or a request that is cancelled, does not change a job. Each step of the end
runs even if an earlier one failed. The fault is logged, and the record says how the job ended.
"""

import logging
import math
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from datetime import datetime, timedelta

import trio
from attrs import define, evolve, field, frozen

from jobworker.errors import (
    InternalError,
    JobworkerError,
    LauncherGone,
    LauncherSilent,
    NotFound,
    OutputError,
)
from jobworker.jobs.end_words import words_of
from jobworker.jobs.ending import Ending
from jobworker.jobs.history.history import History
from jobworker.jobs.orders import limits_of, order_of
from jobworker.jobs.output.batched_wakeups import BatchedEvent
from jobworker.jobs.output.mover import OutputMover, OutputRoom
from jobworker.jobs.output.sizes import as_of_now, with_sizes
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.secrets import Secrets
from jobworker.jobs.start_failures import has_not_run, may_pass, undecided
from jobworker.model.job import (
    SERVICE_ENDED,
    JobRecord,
    JobSpec,
    Limits,
    OutputCut,
    OutputPolicy,
    Stream,
    Usage,
)
from jobworker.model.lifecycle import TERMINAL, Event, Reason, State, advance
from jobworker.model.summary import without_bulk
from jobworker.sandbox.cgroup import hierarchy as cgroups
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.service.job_ends import Exits, Notices, Started
from jobworker.sandbox.service.job_reports import JobExit
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.sandbox.start.plan import Order

log = logging.getLogger("jobworker.jobs")

RECORD_AGAIN_SECONDS = 1.0
"""The pause before another attempt to write a record that the disk has refused."""
START_AGAIN_SECONDS = 1.0
"""The pause before another attempt to start a job that service or launcher could not start."""
LOG_AGAIN_SECONDS = 60.0
"""How often the log says that such a job still waits."""
START_PATIENCE_SECONDS = 1.0
"""How long a start may go on after a stop or the end of the service. Most starts take less."""


Clock = Callable[[], datetime]


@frozen(kw_only=True)
class Rules:
    """The settings of the configuration for every job."""

    defaults: Limits
    timeout_seconds: float
    stop_grace_seconds: float
    at_max_output: OutputPolicy
    on_disk_full: OutputPolicy


def _set_event() -> trio.Event:
    event = trio.Event()
    event.set()
    return event


@define(eq=False, kw_only=True)
class Execution:
    """A live job. `ended` is set when its record is final."""

    record: JobRecord
    """The record that clients may see. It has the end only once `ended` is set: when the end is on
    the disk, or the disk has refused it."""
    spool: Spool
    _launcher: LauncherClient
    _history: History
    _rules: Rules
    _clock: Clock
    _room: OutputRoom
    admitted_at_once: bool
    """Whether there was a free place when the job came; if not, it waits for one."""
    secrets: Secrets = field(factory=Secrets, repr=False)
    """The values of secret variables, which the record masks. They are never on the disk."""
    admission: trio.Event = field(factory=_set_event, init=False)
    """Set once the job's first record is on the disk, or the job is `refused`."""
    decided: trio.Event = field(factory=trio.Event, init=False)
    """Set once it is known whether the program runs."""
    ended: trio.Event = field(factory=trio.Event, init=False)
    parted: BatchedEvent = field(factory=BatchedEvent, init=False)
    """Set once this service gets no more news of the job: it has ended, or was left."""
    archived: trio.Event = field(factory=trio.Event, init=False)
    """Set once the archive has the output and may remove it, whether the end is recorded or not."""
    over: trio.Event = field(factory=trio.Event, init=False)
    """Set once this task is done with the job: the job has ended, or was left."""
    forgotten: trio.Event = field(factory=trio.Event, init=False)
    """Set once the supervisor has forgotten the job: only history and archive have it."""
    _waits_for_the_next: bool = field(default=False, init=False)
    """Whether the job, if it has not started, is left to the next service."""
    _left: bool = field(default=False, init=False)
    """Whether this service ends and does not wait for the job any more."""
    _unwanted: trio.Event = field(factory=trio.Event, init=False)
    """Set once the start may be given up: the job is to end, or the service ends."""
    _ends_with_service: bool = field(default=False, init=False)
    """Whether the end of this service is the first reason for the job's end."""
    refused: bool = field(default=False, init=False)
    """Whether the client was told that the job could not be admitted."""
    start_error: JobworkerError | None = field(default=None, init=False)
    """Why the program was not started."""
    _changed: trio.Event = field(factory=trio.Event, init=False)
    """Set when the record of a running job has changed and is to be written."""
    _settled: trio.Event = field(factory=trio.Event, init=False)
    """Set once the end is on the disk, or the job is removed, and the launcher has forgotten it."""
    _unrecorded: bool = field(default=False, init=False)
    """Whether the record must not be in the history, since the job was refused or removed."""
    _settling: trio.Lock = field(factory=trio.Lock, init=False)
    _inherited: tuple[Started, Exits] | None = field(default=None, init=False)
    """What the launcher has of the job, if an earlier service has started it."""
    _runs_since: float | None = field(default=None, init=False)
    """When the program began, by Trio's clock, which is never set back."""
    _exited_at: float | None = field(default=None, init=False)
    """When the program ended, by the same clock."""
    _company: trio.CancelScope = field(factory=trio.CancelScope, init=False)
    """The scope of the tasks beside the running job. Its cancellation leaves the job."""
    _ending: Ending = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._ending = Ending(
            job=self.record.id,
            launcher=self._launcher,
            grace_seconds=self._rules.stop_grace_seconds,
            told=self._on_told,
        )

    @property
    def stopping(self) -> bool:
        """Whether a client, or the end of the service, has asked for the job's end."""
        return self._ending.stopping

    def request_stop(self, number: signal.Signals, grace_seconds: float | None) -> None:
        """Ask for the job's end: send `number`, and kill after the grace period. None: the default.

        May be called again: each signal is delivered, and the earliest deadline counts.
        """
        if self.ended.is_set() or self._ending.exited:
            return
        if self.record.stop_requested_at is None:
            self.record = evolve(self.record, stop_requested_at=self._clock())
        self._ending.stop(number, grace_seconds)
        self._unwanted.set()
        if not self._launcher.keeps_asks:  # then only the record tells the next service of it
            self._changed.set()

    def end_with_service(self, grace_seconds: float) -> None:
        """Ask for the job's end since this service ends, which the record will say."""
        self._ends_with_service = not self._ending.stopping
        self.request_stop(signal.SIGTERM, grace_seconds)

    def _on_told(self) -> None:
        """Write a stop to the record, now that the launcher has it for the next service."""
        if self.record.stop_requested_at is not None:
            self._changed.set()

    def refuse(self) -> None:
        """Take back a job whose admission could not be recorded. Its client gets an error.

        The job may run already. It is killed, and no record or output of it stays.
        """
        self.refused = self._unrecorded = True
        self._ending.stop(signal.SIGKILL, 0)
        self._unwanted.set()

    def inherit(self, started: Started, exits: Exits) -> None:
        """Go on with a job that an earlier service has started. Call it before `run`."""
        self._inherited = (started, exits)
        self.spool.restore_discarded(self.record.discarded_bytes)
        if started.asked is not None:
            self._ending.resume(started.asked)
            if self._ending.stopping and self.record.stop_requested_at is None:
                ago = timedelta(seconds=started.asked.seconds_ago)
                self.record = evolve(self.record, stop_requested_at=self._clock() - ago)
                self._changed.set()
            return
        # The launcher did not get a request to end the job, or it is of an earlier version, which
        # got one and did not keep it.
        if self.record.output_cut and self._policy_at(self.record.output_cut) == "stop":
            if not self._launcher.keeps_asks:
                self._ending.go_on()
            self._ending.stop_for_output()
        if self.record.stop_requested_at is not None:
            if not self._launcher.keeps_asks:
                self._ending.go_on()
            self.request_stop(signal.SIGTERM, None)

    def inherit_end(self) -> None:
        """Take the end from the record, which comes from the history or the job's note."""
        self.spool.close()
        self._tell(self.record)

    def leave(self, *, anyway: bool = False) -> None:
        """Leave a running job to the next service, unless it is being stopped.

        A start under way is given up, and the job waits for the next service. `anyway`: leave a job
        that is being stopped too. The stop is recorded, and the next service goes on with it.
        """
        self._left = self._left or anyway
        self._unwanted.set()
        if anyway or not self._ending.under_way:
            self._company.cancel()

    def wait_for_the_next(self) -> None:
        """Leave the job to the next service, if it has not started and cannot be started now."""
        self._waits_for_the_next = True

    def detach(self) -> None:
        """End this service's part in a job that is left to the next one."""
        self.spool.close()
        self.parted.set()
        self.over.set()

    def record_now(self) -> JobRecord:
        """The record of the job, with the present sizes of its output if it has not ended."""
        return as_of_now(self.record, self.spool.statistics())

    async def usage(self) -> Usage | None:
        """What the job uses now, or has used; None if it never ran or the launcher cannot tell."""
        if self.record.state is State.RUNNING and not self.ended.is_set():
            try:
                return await self._launcher.usage(self.record.id)
            except JobworkerError:
                return self.record.usage  # the job ended meanwhile
        return self.record.usage

    async def run(self) -> None:
        """Run the job to its end, or until it is left. Raises only unexpected faults."""
        if self.ended.is_set():
            self.over.set()
            return
        begun = await self._begin()
        if begun is None:
            return
        started, exits = begun
        self._runs_since = trio.current_time() - started.age_seconds
        self.decided.set()
        ending: JobExit | None = None
        with self._company:
            async with self._output(started), trio.open_nursery() as nursery:
                nursery.start_soon(self.store)
                nursery.start_soon(self._ending.serve)
                nursery.start_soon(self._ending.time_out, self._seconds_left(started))
                nursery.start_soon(self._record_changes)
                nursery.start_soon(self._take_notices, started.notices)
                with suppress(trio.EndOfChannel):  # the launcher has ended, and so has the job
                    ending = await exits.receive()
                self._exited_at = trio.current_time() - (ending.seconds_ago if ending else 0)
                self._ending.exited = True
                await self.admission.wait()
                if self.refused:  # before another record is waited for: the service may be ending
                    await self._settle()
                nursery.cancel_scope.cancel()
        # A job that was left stays left, even if its exit is known: its pipes may still have
        # output. The launcher keeps them, and the exit status, until the next service has both.
        with suppress(trio.WouldBlock, trio.EndOfChannel):  # a notice may have come just before
            while True:
                self._take_notice(started.notices.receive_nowait())
        if self._company.cancelled_caught:
            await self._leave_behind()
            self.detach()
        else:
            await self._finish(ending)

    async def _leave_behind(self) -> None:
        """Write what clients know of a job that is left, for the next service, if the disk allows.

        A refused job is not left but removed: its client knows of no job.
        """
        if self.refused:
            await self._settle()
            return
        is_counted = await self.spool.record_discarded()
        if self._changed.is_set() or self._ending.stopping or not is_counted:
            is_stored = await self.store()
            if not (is_counted or is_stored):
                log.error(
                    "job %d: it is left, and no disk takes the record that %d bytes of its output "
                    "were discarded: the next service may not tell of that gap",
                    self.record.id,
                    self.spool.statistics().discarded_bytes,
                )

    async def _begin(self) -> tuple[Started, Exits] | None:
        """Have the launcher start the job, unless an earlier service has. None if it cannot.

        If service or launcher lacks something at the moment, the job waits and is tried again.
        """
        if self._inherited is not None:
            return self._inherited
        logged_at = -math.inf
        while True:
            if self.record.state is State.PENDING:
                if self._ending.stopping:
                    await self._close(self._advanced(Event.STOP))
                    return None
                if self._waits_for_the_next:
                    self.detach()
                    self.decided.set()
                    return None
                self.record = self._advanced(Event.ADMIT)
                await self.store()
            try:
                spec = await self._whole_spec()
                order = order_of(spec, self.record.id, await self.secrets.values())
                begun = await self._spawn(order, limits_of(spec))
                break
            except JobworkerError as error:
                if has_not_run(error):
                    self.record = evolve(self.record, state=State.PENDING)
                    await self.store()
                    continue
                if self._left:  # the next service will see whether the job was started
                    self.start_error = undecided(self.record.id)
                    if self._ending.stopping:
                        await self.store()
                    self.detach()
                    self.decided.set()
                    return None
                if self.admitted_at_once or not may_pass(error):
                    await self._end_unstarted(error)
                    return None
                if trio.current_time() > logged_at + LOG_AGAIN_SECONDS:
                    logged_at = trio.current_time()
                    log.error("job %d waits, and is tried again: %s", self.record.id, error)
            # Its program has not run, so the job is PENDING again, also for the next service.
            self.record = evolve(self.record, state=State.PENDING)
            await self.store()
            await trio.sleep(START_AGAIN_SECONDS)
        self.secrets.drop()
        self.shorten()
        self.record = self._advanced(Event.START, started_at=self._clock())
        return begun

    async def _spawn(self, order: Order, limits: cgroups.ScopeLimits) -> tuple[Started, Exits]:
        """Have the launcher start the job, or give the start up once it is `_unwanted`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up_unwanted)
            try:
                return await self._launcher.spawn(self.record.id, order, limits)
            except JobworkerError as error:
                failure = error
            finally:
                nursery.cancel_scope.cancel()
        try:
            raise failure
        finally:
            del failure  # its traceback has this frame: together they would be a cycle

    async def _give_up_unwanted(self) -> None:
        await self._unwanted.wait()
        await trio.sleep(START_PATIENCE_SECONDS)
        with suppress(JobworkerError):
            await self._launcher.give_up_start(self.record.id)

    async def _whole_spec(self) -> JobSpec:
        """The whole request, from the record or from the history. Raises JobworkerError."""
        if not self.record.abridged:
            return self.record.spec
        stored = await self._history.request(self.record.id)
        if stored is None:
            raise InternalError(
                f"cannot start job {self.record.id}: the history has lost its request",
                remedy="run the command again",
            )
        return stored

    def shorten(self) -> None:
        """Free the memory of a large request. The history has all of it."""
        self.record = without_bulk(self.record)

    def _output(self, started: Started) -> AbstractAsyncContextManager[None]:
        if self.spool.sealed:  # an earlier service has sealed it at the job's end
            close_all([started.stdout, started.stderr])
            return nullcontext()
        mover = OutputMover(
            spool=self.spool,
            max_bytes=self.record.spec.limits.output_bytes or None,
            room=self._room,
            tell_cut=self._output_cut,
            keep_cut=self._keep_cut,
            cut=self.record.output_cut,
        )
        return mover.moving({Stream.STDOUT: started.stdout, Stream.STDERR: started.stderr})

    def _output_cut(self, cut: OutputCut, why: str) -> None:
        """Note in the record that the log is cut, and follow the policy of the configuration."""
        policy = self._policy_at(cut)
        self.record = evolve(self.record, output_cut=cut)
        self._note(why)
        self._changed.set()
        log.warning("job %d: %s; policy: %s", self.record.id, why, policy)
        if policy == "stop":
            self._ending.stop_for_output()

    async def _keep_cut(self) -> None:
        """Write to the job's note that the log is cut: the history may take long to record it.

        If this service were killed before that, the next one would add to the log after a gap.
        """
        await self._history.keep_note(self.record_now())

    async def _take_notices(self, notices: Notices) -> None:
        async for words in notices:
            self._take_notice(words)

    def _take_notice(self, words: str) -> None:
        """Add a notice of the launcher about the running job to the record."""
        if words not in self.record.detail:  # it is there if an earlier service got it too
            log.warning("job %d: %s", self.record.id, words)
            self._note(words)
            self._changed.set()

    def _policy_at(self, cut: OutputCut) -> OutputPolicy:
        if cut is OutputCut.LIMIT:
            return self.record.spec.at_max_output or self._rules.at_max_output
        return self._rules.on_disk_full

    def _note(self, detail: str) -> None:
        self.record = self.record.noted(detail)

    async def store(self) -> bool:
        """Write the present record to the history. Returns whether it is there.

        A refusal is logged: the job goes on.
        """
        return await self._store(self.record_now())

    async def _store(self, record: JobRecord) -> bool:
        try:
            await self._put(record)
        except JobworkerError as error:
            log.error("%s", error)
            return False
        return True

    async def _put(self, record: JobRecord) -> None:
        """Write a record to the history, unless the job was refused or removed.

        Waits until the first record of the job is there. An earlier write would use the space that
        is reserved for ends, and would stay if the job is refused. Raises InternalError.
        """
        if not self.admission.is_set():
            await self.admission.wait()
        if not self._unrecorded:
            await self._history.put(record)

    def _seconds_left(self, started: Started) -> float | None:
        seconds = self.record.spec.timeout_seconds
        return max(0.001, seconds - started.age_seconds) if seconds else None

    async def _record_changes(self) -> None:
        """Write the record whenever it has changed: a stop was requested, or the log was cut.

        So the next service goes on with it if this one is killed. If the disk refuses, which may be
        why the log was cut, this tries again.
        """
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            try:
                await self._put(self.record_now())
            except JobworkerError as error:
                log.debug("%s", error)
                self._changed.set()
                await trio.sleep(RECORD_AGAIN_SECONDS)
            except BaseException:  # cancelled: `_leave_behind` has to write it
                self._changed.set()
                raise

    # --- the end ----------------------------------------------------------------------------

    async def _end_unstarted(self, error: JobworkerError) -> None:
        # The frames of its traceback hold this execution and the values of secret variables: they
        # would be a cycle, which Python collects seldom.
        error.__traceback__ = error.__context__ = None
        self.start_error = error
        if isinstance(error, LauncherGone):
            end = self._advanced(Event.FAIL, reason=Reason.LOST, detail=str(error))
        else:
            changes = {"exit_code": error.exit_code} if error.exit_code in (126, 127) else {}
            end = self._advanced(Event.FAIL, reason=Reason.START, detail=str(error), **changes)
        await self._close(end)

    async def _finish(self, ending: JobExit | None) -> None:
        event, reason = self._ending.verdict(ending)
        changes: dict[str, object] = {}
        if ending is not None:
            changes = {"exit_code": ending.code, "signal": ending.signal, "usage": ending.usage}
        await self._close(
            self._advanced(event, *words_of(ending, reason), reason=reason, **changes)
        )

    async def fail_internally(self, incident: str) -> None:
        """End a job whose task failed by an unexpected fault before `ended` was set."""
        words = f"an internal fault ended the job (incident {incident})"
        await self._close(self._advanced(Event.FAIL, words, reason=Reason.LOST))

    async def _close(self, end: JobRecord) -> None:
        """Seal the output, record the end, announce it, and remove the job in the launcher.

        Each step is done even if one before it fails. The order matters if the service is killed in
        between: until the end is recorded, the launcher must have the job, and no client may see
        the end. If the disk refuses the end, clients get it at once, but the job keeps its place,
        also in the launcher, until the disk takes the end (`settle`).
        """
        self._ending.exited = True
        recorded = False
        try:
            with trio.CancelScope(shield=True):  # waits only for the disk
                try:
                    await self.spool.seal()
                except OutputError as error:
                    end = end.noted(str(error))
                except Exception as error:
                    log.exception("job %d: its output is not sealed", end.id)
                    end = end.noted(f"its output could not be sealed: {error}")
                end = with_sizes(end, self.spool.statistics())
                # Synced before the end is announced, so that the output outlives a power cut.
                async with self.spool.synced(end.id, end.owner):
                    recorded = await self._store(end)
                if self.spool.sync_fault:
                    end = end.noted(self.spool.sync_fault)
                    recorded = await self._store(end)
        finally:
            self.spool.close()
            self._tell(end)
        try:
            if recorded:
                await self._settle()  # answered once its place is free: nobody waits for that
        finally:
            self.over.set()

    def _tell(self, end: JobRecord) -> None:
        self.record = end
        self._ending.close()
        self.decided.set()
        self.ended.set()
        self.parted.set()

    async def settle(self) -> None:
        """Wait until the end is recorded, or the job is removed, and the launcher forgot the job.

        Tries again as long as the disk or the launcher refuses.
        """
        while not self._settled.is_set():
            with trio.move_on_after(RECORD_AGAIN_SECONDS):
                await self._settled.wait()
            with suppress(JobworkerError):
                async with self._settling:  # or the record of a removed job would come back
                    if not self._settled.is_set():
                        await self._put(self.record)
                await self._settle()

    async def _settle(self) -> None:
        """Have the launcher forget the job, if it still has it. The launcher may refuse for now."""
        if not self._settled.is_set() and await self._remove():
            self._settled.set()

    @property
    def is_gone(self) -> bool:
        """Whether neither history nor launcher has the job any more."""
        return self._unrecorded and self._settled.is_set()

    def mark_removed(self, when: datetime) -> None:
        """Note in memory that the output of an ended job was removed at this time."""
        self.record = evolve(self.record, output_removed_at=when)

    async def record_removal(self) -> None:
        """Write the record with the removal to the history. Raises InternalError."""
        await self._put(self.record)

    async def remove_record(self) -> bool:
        """Remove an ended job from the history. Returns whether the launcher has forgotten it too.

        If not, `settle` sees to that: the launcher may wait for a disk that hangs, and other
        removals must not wait for this one. Raises InternalError.
        """
        async with self._settling:
            if not self._unrecorded:
                await self._history.remove(self.record.id)
                self._unrecorded = True
        return self.is_gone

    async def _remove(self) -> bool:
        """Have the launcher kill and forget the job. Returns False if it may still have the job.

        Then another attempt is needed: the next service would adopt a job that the launcher has and
        the history does not have.
        """
        if self.record.started_at is not None:
            try:
                await self._launcher.remove(self.record.id)
            except JobworkerError as error:
                gone = isinstance(error, (LauncherGone, NotFound))
                is_over = gone or isinstance(error, LauncherSilent)  # this service ends
                level = logging.DEBUG if is_over else logging.ERROR
                log.log(level, "job %d: the launcher keeps it, for now: %s", self.record.id, error)
                return gone
        return True

    def _ended_at(self) -> datetime:
        """The time at which the job ended: its start plus the time that it has run, or later.

        The end may be a while ago, since output was drained after it, or no service was running.
        The time of day may have been set back since the start.
        """
        now = trio.current_time()
        exited_at = now if self._exited_at is None else self._exited_at
        ended_at = self._clock() - timedelta(seconds=now - exited_at)
        if self.record.started_at is None or self._runs_since is None:
            return ended_at
        ran_seconds = max(0.0, exited_at - self._runs_since)
        return max(ended_at, self.record.started_at + timedelta(seconds=ran_seconds))

    def _advanced(self, event: Event, *words: str, **changes: object) -> JobRecord:
        """The record after `event`, with `words` added to its detail and other `changes`."""
        record = self.record
        for each in words:
            record = record.noted(each)
        if event is Event.STOP and self._ends_with_service:
            record = record.noted(SERVICE_ENDED)
        state = advance(record.state, event)
        if state in TERMINAL:
            changes["ended_at"] = self._ended_at()
        return evolve(record, state=state, **changes)  # type: ignore[arg-type]
