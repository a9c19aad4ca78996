"""The admission of jobs: a request gets an id, a place and a record, and becomes an execution.

The jobs of an earlier service come in here too. A job that may run at once starts while its first
record is being written. If the disk refuses the record, the job is killed, and the client gets the
error.
"""

import logging
import math
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import trio
from attrs import define, evolve, field

from jobworker.errors import JobworkerError, ShuttingDown
from jobworker.jobs.archive import Archive
from jobworker.jobs.execution import Execution
from jobworker.jobs.history.history import History
from jobworker.jobs.history.job_note import make_note, note_refusal
from jobworker.jobs.inheritance import Takeover
from jobworker.jobs.live_record import LiveRecord
from jobworker.jobs.lookup import output_of
from jobworker.jobs.orders import first_record, limits_of, order_of
from jobworker.jobs.output.directory import unmake_files
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.places import Places
from jobworker.jobs.quota import QuotaUse, check_quota
from jobworker.jobs.rules import Clock, Rules
from jobworker.jobs.secrets import Secrets, check_room
from jobworker.model.access import Quota
from jobworker.model.checked_classes import evolve_unchecked
from jobworker.model.job import JobId, JobRecord, JobSpec, Limits
from jobworker.model.lifecycle import Event, advance
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.sandbox.service.launcher_errors import launcher_silent
from jobworker.serialization.json_text import LONG_CHARACTERS
from jobworker.threads import in_thread

log = logging.getLogger("jobworker.jobs")

_NOT_YET = JobId(1)
"""The id in the plan of a job that has none."""


@define(eq=False, kw_only=True)
class Admission:
    """Admits the jobs of one service to its `live` jobs."""

    _launcher: LauncherClient
    _history: History
    _archive: Archive
    _spools: Path
    _rules: Rules
    _clock: Clock
    _places: Places
    _live: dict[JobId, Execution]
    _arriving: dict[JobId, tuple[str, Limits, Secrets]] = field(factory=dict, init=False)
    """Owner, limits and secrets of jobs that are being admitted and are not live yet."""
    _undecided: int = field(default=0, init=False)
    """The number of admissions of which the first record is neither on the disk nor refused."""
    _all_decided: trio.Event = field(factory=trio.Event, init=False)
    _closing: bool = field(default=False, init=False)

    def take_over(self, inheritance: Takeover) -> None:
        """Take the jobs of an earlier service."""
        for running in inheritance.running:
            execution = self._make_execution(running.record, running.spool, at_once=True)
            execution.inherit(running.started, running.exits)
            self._archive.count_live(running.spool)
            self._inherit(execution)
        for ended in inheritance.ended:
            execution = self._make_execution(ended.record, ended.spool, at_once=True)
            self._archive.count_live(ended.spool)
            execution.inherit_end()
            self._inherit(execution)
        for waiting in inheritance.waiting:
            execution = self._make_execution(waiting.record, waiting.spool, at_once=False)
            self._inherit(execution)
            if waiting.record.stop_requested_at is not None:
                execution.request_stop(signal.SIGTERM, None)
                self._places.end_without_a_place(execution)

    def _inherit(self, execution: Execution) -> None:
        self._live[execution.record.id] = execution
        self._places.inherit(execution)

    async def admit(
        self, spec: JobSpec, owner: str, quota: Quota, *, longest_seconds: float
    ) -> Execution:
        """Admit a job. Returns once it is recorded; it may be starting already.

        Parameters and errors: see `Supervisor.submit`. If the caller is cancelled, the job still
        goes on once it is admitted.
        """
        if spec.check_size() > LONG_CHARACTERS:
            await trio.lowlevel.checkpoint()  # with a megabyte each step takes milliseconds
        spec = evolve_unchecked(spec, limits=spec.limits.or_defaults(self._rules.defaults))
        secrets = await Secrets.of(spec.secret_environment)
        if self._closing:
            raise ShuttingDown("cannot run the command: the service is shutting down")
        if self._launcher.silent:
            raise launcher_silent()
        arriving = [limits for name, limits, _ in self._arriving.values() if name == owner]
        self._places.check_room(owner, arriving=len(arriving))
        # No checkpoint from here until the job is counted: otherwise two requests could both get
        # the last place.
        check_quota(quota, self._use_of(owner, arriving), spec.limits)
        check_room(secrets, self._secrets_beside(owner))
        self._undecided += 1
        try:
            with trio.CancelScope(shield=True):  # waits only for the disk
                execution = await self._admit(spec, owner, longest_seconds, secrets)
        finally:
            self._undecided -= 1
            if not self._undecided:
                self._all_decided.set()
        return execution

    async def plan(self, spec: JobSpec) -> tuple[Limits, list[tuple[str, str, str]]]:
        """Return the limits of a job, with defaults filled in, and the steps of its start.

        Starts nothing. Raises the errors that would refuse the job before its first step.
        """
        spec.check_size()
        await trio.lowlevel.checkpoint()
        full = evolve_unchecked(spec, limits=spec.limits.or_defaults(self._rules.defaults))
        steps = await self._launcher.plan(order_of(full, _NOT_YET, {}), limits_of(full))
        return full.limits, steps

    async def close(self) -> None:
        """Admit no more jobs. Returns once each admission that is under way is decided.

        Refused jobs are being killed then. Waits only for the disk.
        """
        self._closing = True
        if self._undecided:
            self._all_decided = trio.Event()
            await self._all_decided.wait()

    def _use_of(self, owner: str, arriving: Iterable[Limits]) -> QuotaUse:
        """What the jobs of an owner have of its quota."""
        mine = [e for e in self._live.values() if e.record.owner == owner]
        live = [e.record.spec.limits for e in mine if not e.ended.is_set()]
        return QuotaUse((*live, *arriving), self._archive.size_of(owner) + output_of(mine))

    def _secrets_beside(self, owner: str) -> Iterator[tuple[bool, Secrets]]:
        """Yield the secrets of each job, with whether the job is this owner's."""
        for execution in self._live.values():
            yield execution.record.owner == owner, execution.secrets
        for name, _, secrets in self._arriving.values():
            yield name == owner, secrets

    async def _admit(
        self, spec: JobSpec, owner: str, longest_seconds: float, secrets: Secrets
    ) -> Execution:
        job = self._history.take_id()
        at_once = self._places.take()
        record = self._first_record(job, spec, owner, longest_seconds, at_once)
        self._arriving[job] = owner, spec.limits, secrets
        try:
            spool = await in_thread(self._make_spool, record)
        except BaseException:
            self._places.give_back()
            raise
        finally:
            del self._arriving[job]  # the job becomes live now, or has failed
            self._places.keep_promise(at_once)
        admission = trio.Event()
        execution = self._make_execution(
            record, spool, at_once=at_once, secrets=secrets, admission=admission
        )
        self._live[job] = execution
        self._places.queue(execution)
        try:
            # The job starts meanwhile: both take some time.
            await self._history.put(execution.record, is_new=True)
        except Exception:
            execution.refuse()
            self._places.end_without_a_place(execution)
            await self._note_refusal(job)
            raise
        finally:
            admission.set()
        if not at_once:
            execution.live_record.shorten()
        return execution

    def _first_record(
        self, job: JobId, spec: JobSpec, owner: str, longest_seconds: float, at_once: bool
    ) -> JobRecord:
        default = self._rules.timeout_seconds
        if longest_seconds < (default or math.inf):
            default = longest_seconds
        record = first_record(job, spec, owner, timeout_seconds=default, now=self._clock())
        if at_once:  # by the history a PENDING job has never run, and this one may run any time
            record = evolve(record, state=advance(record.state, Event.ADMIT))
        return record

    async def _note_refusal(self, job: JobId) -> None:
        """Write to the job's note that it was refused, before its client gets the error.

        If this service is killed now, the next one would otherwise adopt the job.
        """
        try:
            await in_thread(note_refusal, self._spools, job)
        except JobworkerError as error:
            log.error("job %d is refused, and the disk refuses to note that: %s", job, error)

    def _make_spool(self, record: JobRecord) -> Spool:
        """Make the files of a job's output, and the job's note. For a thread."""
        self._history.keep_id(record.id)
        directory = self._spools / str(record.id)
        spool = Spool.create(directory)
        try:
            make_note(self._spools, record)
        except BaseException:
            spool.close()
            unmake_files(directory)
            raise
        return spool

    def _make_execution(
        self,
        record: JobRecord,
        spool: Spool,
        *,
        at_once: bool,
        secrets: Secrets | None = None,
        admission: trio.Event | None = None,
    ) -> Execution:
        """`admission`: set once the first record is on the disk or refused; None: it is there."""
        self._archive.leave_alone(record.id)
        live_record = LiveRecord(
            record=record, spool=spool, history=self._history, clock=self._clock
        )
        if admission is not None:
            live_record.admission = admission
        return Execution(
            live_record=live_record,
            launcher=self._launcher,
            rules=self._rules,
            room=self._archive.room_of(record.owner),
            admitted_at_once=at_once,
            secrets=secrets or Secrets(),
        )
