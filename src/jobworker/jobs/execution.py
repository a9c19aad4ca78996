"""One job from its admission to its end: the task with the nursery of all that belongs to it.

    start ─► RUNNING ─► ┌ output     a pump moves it from the pipes to the spool
                        ├ time-out   ends the job after its time limit
                        ├ ending     signal, grace period, kill
                        ├ record     is written when it changes
                        └ exit       the launcher reports it; then the others end
            ─► drain ─► seal ─► record, and then the supervisor goes on:
               archive ─► settle: the launcher forgets the job

Clients' requests do not run in this task: they call `request_stop` and wait for events. So a
client that disconnects, or a request that is cancelled, does not change a job. Each step of the end
runs even if an earlier one failed. The fault is logged, and the record says how the job ended.
"""

import logging
import signal
from contextlib import AbstractAsyncContextManager, nullcontext, suppress

import trio
from attrs import define, field

from jobworker.errors import JobworkerError, OutputError
from jobworker.jobs.end_words import words_of
from jobworker.jobs.ending import Ending
from jobworker.jobs.live_record import LiveRecord
from jobworker.jobs.output.batched_wakeups import BatchedEvent
from jobworker.jobs.output.mover import OutputMover, OutputRoom
from jobworker.jobs.output.sizes import with_sizes
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.rules import Rules
from jobworker.jobs.secrets import Secrets
from jobworker.jobs.settlement import Settlement
from jobworker.jobs.starting import Starting
from jobworker.model.job import JobRecord, OutputCut, OutputPolicy, Stream, Usage
from jobworker.model.lifecycle import Event, Reason, State
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.service.job_ends import Exits, Notices, Started
from jobworker.sandbox.service.job_reports import JobExit
from jobworker.sandbox.service.launcher_client import LauncherClient

log = logging.getLogger("jobworker.jobs")


@define(eq=False, kw_only=True)
class Execution:
    """A live job. `ended` is set when its record is final."""

    live_record: LiveRecord
    _launcher: LauncherClient
    _rules: Rules
    _room: OutputRoom
    admitted_at_once: bool
    """Whether there was a free place when the job came; if not, it waits for one."""
    _secrets: Secrets = field(factory=Secrets, repr=False)
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
    refused: bool = field(default=False, init=False)
    """Whether the client was told that the job could not be admitted."""
    _inherited: tuple[Started, Exits] | None = field(default=None, init=False)
    """What the launcher has of the job, if an earlier service has started it."""
    _company: trio.CancelScope = field(factory=trio.CancelScope, init=False)
    """The scope of the tasks beside the running job. Its cancellation leaves the job."""
    _ending: Ending = field(init=False)
    _starting: Starting = field(init=False)
    settlement: Settlement = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._ending = Ending(
            job=self.record.id,
            launcher=self._launcher,
            grace_seconds=self._rules.stop_grace_seconds,
            told=self.live_record.stop_was_told,
        )
        self._starting = Starting(
            live_record=self.live_record,
            launcher=self._launcher,
            ending=self._ending,
            is_tried_once=self.admitted_at_once,
            secrets=self._secrets,
        )
        self.settlement = Settlement(live_record=self.live_record, launcher=self._launcher)

    @property
    def record(self) -> JobRecord:
        """The record that clients may see. It has the end only once `ended` is set."""
        return self.live_record.record

    @property
    def spool(self) -> Spool:
        """The job's output."""
        return self.live_record.spool

    @property
    def secrets(self) -> Secrets:
        """The values of secret variables. There are none once the program runs."""
        return self._starting.secrets

    @property
    def start_error(self) -> JobworkerError | None:
        """Why the program was not started."""
        return self._starting.error

    def request_stop(self, number: signal.Signals, grace_seconds: float | None) -> None:
        """Ask for the job's end: send `number`, and kill after the grace period. None: the default.

        May be called again: each signal is delivered, and the earliest deadline counts.
        """
        if self.ended.is_set() or self._ending.exited:
            return
        self.live_record.note_stop()
        self._ending.stop(number, grace_seconds)
        self._starting.give_up()
        if not self._launcher.keeps_asks:  # then only the record tells the next service of it
            self.live_record.changed.set()

    def end_with_service(self, grace_seconds: float) -> None:
        """Ask for the job's end since this service ends, which the record will say."""
        self.live_record.ends_with_service = not self._ending.stopping
        self.request_stop(signal.SIGTERM, grace_seconds)

    def refuse(self) -> None:
        """Take back a job whose admission could not be recorded. Its client gets an error.

        The job may run already. It is killed, and no record or output of it stays.
        """
        self.refused = self.live_record.is_withdrawn = True
        self._ending.stop(signal.SIGKILL, 0)
        self._starting.give_up()

    def inherit(self, started: Started, exits: Exits) -> None:
        """Go on with a job that an earlier service has started. Call it before `run`."""
        self._inherited = (started, exits)
        self.spool.restore_discarded(self.record.discarded_bytes)
        if started.asked is not None:
            self._ending.resume(started.asked)
            if self._ending.stopping and self.record.stop_requested_at is None:
                self.live_record.note_stop(started.asked.seconds_ago)
                self.live_record.changed.set()
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
        self._starting.is_left = self._starting.is_left or anyway
        self._starting.give_up()
        if anyway or not self._ending.under_way:
            self._company.cancel()

    def wait_for_the_next(self) -> None:
        """Leave the job to the next service, if it has not started and cannot be started now."""
        self._starting.waits_for_the_next = True

    def detach(self) -> None:
        """End this service's part in a job that is left to the next one."""
        self.spool.close()
        self.parted.set()
        self.over.set()

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
            return
        begun = self._inherited or await self._starting.run()
        if begun is None:
            self.detach()
            self.decided.set()
        elif isinstance(begun, JobRecord):
            await self._close(begun)
        else:
            await self._accompany(*begun)

    async def _accompany(self, started: Started, exits: Exits) -> None:
        """Do all that a running job needs, until it has exited or is left."""
        self.live_record.note_start(started.age_seconds)
        self.decided.set()
        ending: JobExit | None = None
        with self._company:
            async with self._output(started), trio.open_nursery() as nursery:
                nursery.start_soon(self.live_record.store)
                nursery.start_soon(self._ending.serve)
                nursery.start_soon(self._ending.time_out, self._seconds_left(started))
                nursery.start_soon(self.live_record.serve)
                nursery.start_soon(self._take_notices, started.notices)
                with suppress(trio.EndOfChannel):  # the launcher has ended, and so has the job
                    ending = await exits.receive()
                self.live_record.note_exit(ending.seconds_ago if ending else 0)
                self._ending.exited = True
                await self.live_record.admission.wait()
                if self.refused:  # before another record is waited for: the service may be ending
                    await self.settlement.forget()
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
            await self.settlement.forget()
            return
        is_counted = await self.spool.record_discarded()
        if self.live_record.changed.is_set() or self._ending.stopping or not is_counted:
            is_stored = await self.live_record.store()
            if not (is_counted or is_stored):
                log.error(
                    "job %d: it is left, and no disk takes the record that %d bytes of its output "
                    "were discarded: the next service may not tell of that gap",
                    self.record.id,
                    self.spool.statistics().discarded_bytes,
                )

    def _output(self, started: Started) -> AbstractAsyncContextManager[None]:
        if self.spool.sealed:  # an earlier service has sealed it at the job's end
            close_all([started.stdout, started.stderr])
            return nullcontext()
        mover = OutputMover(
            spool=self.spool,
            max_bytes=self.record.spec.limits.output_bytes or None,
            room=self._room,
            tell_cut=self._output_cut,
            keep_cut=self.live_record.keep_note,
            cut=self.record.output_cut,
        )
        return mover.moving({Stream.STDOUT: started.stdout, Stream.STDERR: started.stderr})

    def _output_cut(self, cut: OutputCut, why: str) -> None:
        """Note in the record that the log is cut, and follow the policy of the configuration."""
        policy = self._policy_at(cut)
        self.live_record.note_cut(cut, why)
        log.warning("job %d: %s; policy: %s", self.record.id, why, policy)
        if policy == "stop":
            self._ending.stop_for_output()

    async def _take_notices(self, notices: Notices) -> None:
        async for words in notices:
            self._take_notice(words)

    def _take_notice(self, words: str) -> None:
        """Add a notice of the launcher about the running job to the record."""
        if words not in self.record.detail:  # it is there if an earlier service got it too
            log.warning("job %d: %s", self.record.id, words)
            self.live_record.note(words)

    def _policy_at(self, cut: OutputCut) -> OutputPolicy:
        if cut is OutputCut.LIMIT:
            return self.record.spec.at_max_output or self._rules.at_max_output
        return self._rules.on_disk_full

    def _seconds_left(self, started: Started) -> float | None:
        seconds = self.record.spec.timeout_seconds
        return max(0.001, seconds - started.age_seconds) if seconds else None

    # --- the end ----------------------------------------------------------------------------

    async def _finish(self, ending: JobExit | None) -> None:
        event, reason = self._ending.verdict(ending)
        changes: dict[str, object] = {}
        if ending is not None:
            changes = {"exit_code": ending.code, "signal": ending.signal, "usage": ending.usage}
        words = words_of(ending, reason)
        await self._close(self.live_record.advanced(event, *words, reason=reason, **changes))

    async def fail_internally(self, incident: str) -> None:
        """End a job whose task failed by an unexpected fault before `ended` was set."""
        words = f"an internal fault ended the job (incident {incident})"
        await self._close(self.live_record.advanced(Event.FAIL, words, reason=Reason.LOST))

    async def _close(self, end: JobRecord) -> None:
        """Seal the output, record the end, and announce it.

        Each step is done even if one before it fails. The order matters if the service is killed in
        between: until the end is recorded, the launcher must have the job, and no client may see
        the end. If the disk refuses the end, clients get it at once, but the job keeps its place,
        also in the launcher, until the disk takes the end (`Settlement.finish`).
        """
        self._ending.exited = True
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
                    self.settlement.is_recorded = await self.live_record.store(end)
                if self.spool.sync_fault:
                    end = end.noted(self.spool.sync_fault)
                    self.settlement.is_recorded = await self.live_record.store(end)
        finally:
            self.spool.close()
            self._tell(end)

    async def settle(self) -> None:
        """Have the launcher forget a job whose end is recorded. Call it once after `run`.

        The launcher answers when the place of the job is free, which may take as long as a disk
        hangs. So this comes after the archive has taken the output. If the end is not recorded, or
        the launcher refuses, `Settlement.finish` goes on with it.
        """
        try:
            if self.settlement.is_recorded:
                await self.settlement.forget()
        finally:
            self.over.set()

    def _tell(self, end: JobRecord) -> None:
        self.live_record.record = end
        self._ending.close()
        self.decided.set()
        self.ended.set()
        self.parted.set()
