"""The supervisor: admits jobs, runs each in an execution of its own, and finds them again.

At most `max_running` jobs run, and at most `max_waiting` more wait (`waiting_room`). Further
requests are refused at once. Memory has live jobs only. Ended jobs are in the history and in the
spool directory, so memory does not grow with the number of all jobs.

`serve` owns the nursery of all executions. An unexpected fault of one execution is logged as an
incident and ends its job, and nothing else.
"""

import logging
import math
import shutil
import signal
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path

import trio
from attrs import define, evolve, field

from jobworker.errors import Busy, JobworkerError, LauncherSilent, ShuttingDown
from jobworker.incidents import Incidents
from jobworker.jobs.archive import Archive
from jobworker.jobs.execution import RECORD_AGAIN_SECONDS, Clock, Execution, Rules
from jobworker.jobs.history.history import History
from jobworker.jobs.history.job_note import make_note, note_refusal
from jobworker.jobs.history.search import Filter, Page
from jobworker.jobs.inheritance import Takeover
from jobworker.jobs.lookup import follow_from, output_of, page_of
from jobworker.jobs.orders import first_record, limits_of, order_of
from jobworker.jobs.output.batched_wakeups import BatchedEvent
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.index import BOTH
from jobworker.jobs.output.search import Start
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.quota import QuotaUse, check_quota
from jobworker.jobs.removals import Removals
from jobworker.jobs.retention_policy import EndedOutput, RetentionPolicy
from jobworker.jobs.secrets import Secrets, check_room
from jobworker.jobs.waiting_room import WaitingRoom
from jobworker.model.access import NO_QUOTA, Quota, no_such_job
from jobworker.model.checked_classes import evolve_unchecked
from jobworker.model.job import JobId, JobRecord, JobSpec, Limits, Stream
from jobworker.model.lifecycle import Event, advance
from jobworker.sandbox.service.exchange import Waitable
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.sandbox.service.launcher_errors import launcher_silent
from jobworker.serialization.json_text import LONG_CHARACTERS
from jobworker.threads import in_thread

DECIDE_SECONDS = 5.0
"""How long the end of the service waits for starts that are under way, and then once more for the
launcher to give them up."""
KILL_SECONDS = 10.0
"""How long the end of the service waits for jobs after SIGKILL. The launcher waits as long."""
REMOVE_SECONDS = 3.0
"""How long the end of the service waits for the launcher to forget ended jobs."""
_NOT_YET = JobId(1)
"""The id in the plan of a job that has none."""
log = logging.getLogger("jobworker.jobs")


def _left(job: JobId) -> ShuttingDown:
    return ShuttingDown(
        f"cannot reach job {job}: it is left to the next service",
        remedy="try again once the service has started again",
    )


@define(eq=False, kw_only=True)
class Supervisor:
    """All jobs of this service."""

    _launcher: LauncherClient
    _history: History
    _archive: Archive
    _spools: Path
    _rules: Rules
    _clock: Clock
    _incidents: Incidents
    max_running: int
    max_waiting: int
    _live: dict[JobId, Execution] = field(factory=dict, init=False)
    _pending: WaitingRoom = field(init=False)
    _placed: deque[Execution] = field(factory=deque, init=False)
    """Jobs that do not wait for a place: they have one, or they are only to be ended."""
    _promised: int = field(default=0, init=False)
    """Places of jobs that were admitted to run at once and are not queued yet: no other job may
    take these."""
    _change: trio.Event = field(factory=trio.Event, init=False)
    """Set when a job was queued, or a place has become free."""
    _places_taken: int = field(default=0, init=False)
    """The number of jobs that were admitted and not forgotten: they run, wait, or arrive."""
    _arriving: dict[JobId, tuple[str, Limits, Secrets]] = field(factory=dict, init=False)
    """Owner, limits and secrets of jobs that are being admitted and are not live yet."""
    _undecided: int = field(default=0, init=False)
    """The number of admissions of which the first record is neither on the disk nor refused."""
    _all_decided: trio.Event = field(factory=trio.Event, init=False)
    _closing: bool = field(default=False, init=False)
    _removals: Removals = field(factory=Removals, init=False)

    def __attrs_post_init__(self) -> None:
        self._pending = WaitingRoom(self.max_waiting)

    def take_over(self, inheritance: Takeover) -> None:
        """Go on with the jobs of an earlier service. Call it before `serve`."""
        for running in inheritance.running:
            execution = self._make_execution(running.record, running.spool, True)
            execution.inherit(running.started, running.exits)
            self._archive.count_live(running.spool)
            self._live[running.record.id] = execution
            self._placed.append(execution)
            self._places_taken += 1
        for ended in inheritance.ended:
            execution = self._make_execution(ended.record, ended.spool, True)
            self._archive.count_live(ended.spool)
            execution.inherit_end()
            self._live[ended.record.id] = execution
            self._placed.append(execution)
            self._places_taken += 1
        for waiting in inheritance.waiting:
            execution = self._make_execution(waiting.record, waiting.spool, False)
            self._queue(execution)
            self._places_taken += 1
            if waiting.record.stop_requested_at is not None:
                execution.request_stop(signal.SIGTERM, None)
                self._end_without_a_place(execution)

    async def serve(self) -> None:
        """Run the jobs that are submitted, in order. Never returns."""
        running = 0

        async def run(execution: Execution) -> None:
            nonlocal running
            try:
                await self._run(execution)
            except* Exception:  # noqa: BLE001 - recorded
                self._incidents.record("job", f"the end of job {execution.record.id}")
            finally:
                running -= 1
                self._pending.finished(execution.record.owner)
                self._change.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._incidents.keep_running, "retention", self._archive.serve)
            while True:
                while self._placed or (
                    self._pending and running + self._promised < self.max_running
                ):
                    running += 1
                    execution = self._placed.popleft() if self._placed else self._pending.next()
                    self._pending.started(execution.record.owner)
                    nursery.start_soon(run, execution)
                    del execution  # or this frame would keep the last job after its end
                self._change = trio.Event()
                await self._change.wait()

    async def _run(self, execution: Execution) -> None:
        """Run one job, until it is forgotten. An unexpected fault of it goes no further."""
        try:
            await execution.run()
        except Exception:  # noqa: BLE001 - recorded
            incident = self._incidents.record("job", f"job {execution.record.id}")
            if not execution.ended.is_set():
                with suppress(JobworkerError):
                    await self._launcher.remove(execution.record.id)
                await execution.fail_internally(incident)
        finally:
            try:
                if execution.ended.is_set():
                    await self._archive.add(execution)
                if execution.refused:
                    await self._take_back(execution.record.id)
                if execution.ended.is_set():
                    await execution.settle()
                if execution.is_gone:
                    await self._archive.clear(execution.record.id)
            finally:
                self._forget(execution)

    async def _take_back(self, job: JobId) -> None:
        """Remove all that is left of a refused job.

        If the service ends before the disk allows that, the job's note says that it was refused, so
        the next service removes it.
        """
        while True:
            # At least one attempt, even if the service ends.
            with suppress(JobworkerError), trio.CancelScope(shield=True):
                await self._archive.take_back(job)
                return
            await trio.sleep(RECORD_AGAIN_SECONDS)

    def _forget(self, execution: Execution) -> None:
        del self._live[execution.record.id]
        self._archive.forget(execution)
        execution.over.set()  # also after a fault of ours: the service's end waits for it
        execution.forgotten.set()
        self._places_taken -= 1
        record = execution.record
        if execution.ended.is_set():
            reason = f" ({record.reason.value})" if record.reason else ""
            log.info("job %d: %s%s", record.id, record.state.value, reason)
        elif execution.refused:
            log.info("job %d: refused, and removed", record.id)
        else:
            heir = "launcher" if record.started_at is not None else "next service"
            log.info("job %d: left to the %s", record.id, heir)

    async def submit(
        self,
        spec: JobSpec,
        owner: str,
        quota: Quota = NO_QUOTA,
        *,
        longest_seconds: float = math.inf,
    ) -> Execution:
        """Admit a job. Returns once it is recorded and either runs, has failed to start, or waits.

        `longest_seconds` bounds the time limit of a job that names none. Raises Busy if too many
        jobs wait, QuotaExceeded, TooLarge, ShuttingDown at the end of the service, LauncherSilent,
        OutputError and InternalError if the disk refuses. If the caller is cancelled, the job still
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
        self._check_room(owner)
        # No checkpoint from here until the job is counted: otherwise two requests could both get
        # the last place.
        check_quota(quota, self._use_of(owner), spec.limits)
        check_room(secrets, self._secrets_beside(owner))
        self._undecided += 1
        try:
            with trio.CancelScope(shield=True):  # waits only for the disk
                execution = await self._admit(spec, owner, longest_seconds, secrets)
        finally:
            self._undecided -= 1
            if not self._undecided:
                self._all_decided.set()
        if execution.admitted_at_once:
            await self._wait_for(execution, execution.decided)
        return execution

    async def _wait_for(self, execution: Execution, event: trio.Event | BatchedEvent) -> None:
        """Wait for an event of a job. Raises LauncherSilent if the launcher does not answer."""
        try:
            await self._launcher.wait_unless_silent(event)
        except LauncherSilent:
            raise launcher_silent(execution.record.id) from None

    def _check_room(self, owner: str) -> None:
        """Raise Busy if a job of this owner may neither run at once nor wait."""
        beyond = self._places_taken - self.max_running
        arriving = sum(name == owner for name, _, _ in self._arriving.values())
        if beyond < 0 or self._pending.has_room_for(owner, taken=beyond, arriving=arriving):
            return
        if beyond >= self.max_waiting:
            why = f"{self.max_running} jobs run and {self.max_waiting} wait already"
        else:
            why = f"{beyond} jobs wait, and the last places are for clients with few waiting jobs"
        raise Busy(
            f"cannot run the command: {why}",
            remedy="try again later, or raise worker.max_concurrent_jobs or max_waiting_jobs",
        )

    async def plan(self, spec: JobSpec) -> tuple[Limits, list[tuple[str, str, str]]]:
        """Return the limits of a job, with defaults filled in, and the steps of its start.

        Starts nothing. Raises the errors that would refuse the job before its first step.
        """
        spec.check_size()
        await trio.lowlevel.checkpoint()
        full = evolve_unchecked(spec, limits=spec.limits.or_defaults(self._rules.defaults))
        steps = await self._launcher.plan(order_of(full, _NOT_YET, {}), limits_of(full))
        return full.limits, steps

    def _use_of(self, owner: str) -> QuotaUse:
        """What the jobs of an owner have of its quota."""
        mine = [e for e in self._live.values() if e.record.owner == owner]
        live = [e.record.spec.limits for e in mine if not e.ended.is_set()]
        live += [limits for name, limits, _ in self._arriving.values() if name == owner]
        return QuotaUse(tuple(live), self._archive.size_of(owner) + output_of(mine))

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
        at_once = self._places_taken < self.max_running
        self._places_taken += 1
        self._promised += at_once
        default = self._rules.timeout_seconds
        if longest_seconds < (default or math.inf):
            default = longest_seconds
        record = first_record(job, spec, owner, timeout_seconds=default, now=self._clock())
        if at_once:  # by the history a PENDING job has never run, and this one may run any time
            record = evolve(record, state=advance(record.state, Event.ADMIT))
        self._arriving[job] = owner, spec.limits, secrets
        try:
            spool = await in_thread(self._make_spool, record)
        except BaseException:
            self._places_taken -= 1
            raise
        finally:
            del self._arriving[job]  # the job becomes live now, or has failed
            self._promised -= at_once
            self._change.set()
        execution = self._make_execution(record, spool, at_once)
        execution.secrets = secrets
        execution.admission = trio.Event()
        self._queue(execution)
        try:
            # The job starts meanwhile: both take some time.
            await self._history.put(execution.record, is_new=True)
        except Exception:
            execution.refuse()
            self._end_without_a_place(execution)
            await self._note_refusal(job)
            raise
        finally:
            execution.admission.set()
        if not at_once:
            execution.shorten()
        return execution

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
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return spool

    def _make_execution(self, record: JobRecord, spool: Spool, at_once: bool) -> Execution:
        self._archive.leave_alone(record.id)
        return Execution(
            record=record,
            spool=spool,
            launcher=self._launcher,
            history=self._history,
            rules=self._rules,
            room=self._archive.room_of(record.owner),
            clock=self._clock,
            admitted_at_once=at_once,
        )

    def _queue(self, execution: Execution) -> None:
        self._live[execution.record.id] = execution
        if execution.admitted_at_once:
            self._placed.append(execution)
        else:
            self._pending.add(execution)
        self._change.set()

    def now(self) -> datetime:
        """The time by this service's clock."""
        return self._clock()

    def live(self, job: JobId) -> Execution | None:
        """The execution of a job that is live or has only just ended; None for any other."""
        return self._live.get(job)

    async def record(self, job: JobId, who: str = "") -> JobRecord:
        """The present record of a job, or the summary of an ended job's record.

        `who`, here and below: the name of the client that asks. Queries of different names take
        turns. Raises NotFound, InternalError, OutOfDescriptors, OutputError.
        """
        execution = self._live.get(job)
        if execution is not None:
            return execution.record_now()
        record = await self._history.summary(job, who)
        if record is None:
            raise no_such_job(job)
        return await self._archive.look_after(record)

    async def spec_of(self, job: JobId, who: str) -> str | None:
        """The whole request of a job as JSON if its stored summary is abridged, else None.

        Raises InternalError, OutOfDescriptors.
        """
        return await self._history.spec(job, who)

    async def latest(self, wanted: Filter, limit: int, who: str) -> Page:
        """Return at most `limit` summaries that fit, newest first, as JSON, and where to go on.

        Raises InternalError, OutOfDescriptors.
        """
        before = dict(self._live)
        stored = await self._history.page(wanted, limit, who)
        # Include jobs that have ended meanwhile: the page may have been read just before.
        return await page_of({**before, **self._live}, stored, wanted, limit)

    async def stop(
        self, job: JobId, number: signal.Signals, grace_seconds: float | None, who: str = ""
    ) -> JobRecord:
        """Stop a job and wait for its end. Returns its record. An ended job stays as it is.

        `number`: the first signal. `grace_seconds`: the time until SIGKILL; None is the default.
        Raises NotFound, LauncherSilent, and ShuttingDown if the job is left to the next service.
        """
        execution = self._live.get(job)
        if execution is not None:
            execution.request_stop(number, grace_seconds)
            self._end_without_a_place(execution)
            await self._wait_for(execution, execution.parted)
        return await self.wait(job, who)

    def _end_without_a_place(self, execution: Execution) -> None:
        if execution in self._pending:
            self._pending.remove(execution)
            self._placed.append(execution)
            self._change.set()

    async def wait(self, job: JobId, who: str = "") -> JobRecord:
        """Wait for a job's end, and return its record.

        Raises NotFound, and ShuttingDown if the job is left to the next service.
        """
        execution = self._live.get(job)
        if execution is not None:
            await execution.parted.wait()
            if not execution.ended.is_set():
                raise _left(job)
            return execution.record
        return await self._ended(job, who)

    async def _ended(self, job: JobId, who: str) -> JobRecord:
        """The record of a job that is not live. Raises NotFound, ShuttingDown."""
        record = await self.record(job, who)
        if not record.ended:
            raise _left(job)
        return record

    async def follow(
        self,
        job: JobId,
        start: Start = Start(),  # noqa: B008 - frozen
        *,
        streams: Collection[Stream] = BOTH,
        coalesce: bool = True,
        who: str = "",
    ) -> Follower:
        """Return a follower of a live or ended job's output. The caller closes it.

        `start`, `streams`, `coalesce`: see `Spool.follow`. Raises NotFound, InvalidParams if the
        output is shorter than `start.offset`, TooManyFollows, ShuttingDown, OutputError.
        """
        execution = self._live.get(job)
        if execution is not None and not execution.ended.is_set():
            return await follow_from(execution.spool, start, streams, coalesce)
        async with self._archive.reading(await self._ended(job, who)) as spool:
            return await follow_from(spool, start, streams, coalesce)

    async def remove(self, job: JobId, *, force: bool, who: str = "") -> int:
        """Remove an ended job, its output and its record. Returns how many bytes of output it had.

        With `force` a live job is killed first, and followers lose the output. Raises NotFound, and
        without `force` Busy if the job is live or its output is being followed.
        """
        with self._removals.marked(job) if force else nullcontext():
            return await self._remove(job, force=force, who=who)

    def is_being_removed(self, job: JobId) -> bool:
        """Whether a job is being removed by force, so that its followers cannot get its end."""
        return job in self._removals

    async def _remove(self, job: JobId, *, force: bool, who: str) -> int:
        execution = self._live.get(job)
        if execution is not None:
            if not (force or execution.ended.is_set()):
                raise Busy(
                    f"cannot remove job {job}: it has not ended",
                    remedy="stop it first, or remove it by force (of worker-cli: --force)",
                )
            await self.stop(job, signal.SIGKILL, 0)
            await execution.archived.wait()
        await self.record(job, who)
        freed = await self._archive.remove(job, force=force)
        if execution is not None:
            await execution.forgotten.wait()
        return freed

    async def prune(
        self, policy: RetentionPolicy | None, owner: str | None
    ) -> Sequence[EndedOutput]:
        """Apply a policy to ended jobs' output. Returns the output that was removed.

        `policy`: None is the configured one. `owner`: only this owner's jobs; None: all. Includes
        every job whose end clients know: waits until the archive has those that have just ended.
        Raises InternalError, OutputError, OutOfDescriptors.
        """
        for execution in list(self._live.values()):
            if execution.ended.is_set():
                await execution.archived.wait()
        if owner is None:
            return await self._archive.prune(policy)
        own = await self._history.with_output_of(owner)
        return await self._archive.prune(policy, only=own.__contains__)

    async def _close(self) -> None:
        """Admit no more jobs. Returns once each admission that is under way is decided.

        Refused jobs are being killed then. Waits only for the disk.
        """
        self._closing = True
        if self._undecided:
            self._all_decided = trio.Event()
            await self._all_decided.wait()

    async def shut_down(self, grace_seconds: float) -> None:
        """Admit no more jobs, stop every job, and wait for the ends.

        Jobs that have not ended `KILL_SECONDS` after the grace period are left.
        """
        await self._close()
        executions = list(self._live.values())
        for execution in executions:
            execution.end_with_service(grace_seconds)
            self._end_without_a_place(execution)
        await self._all((each.parted for each in executions), grace_seconds + KILL_SECONDS)
        await self._let_go(executions)

    async def leave(self) -> None:
        """Admit no more jobs, and leave all jobs to the next service.

        Starts that are under way get `DECIDE_SECONDS` to finish, and jobs that are being stopped
        the usual grace period. The next service goes on with those that are undecided then.
        """
        await self._close()
        for waiting in self._pending:
            self._pending.remove(waiting)
            waiting.detach()
            self._forget(waiting)
        executions = list(self._live.values())
        for execution in executions:
            execution.wait_for_the_next()
        await self._all((each.decided for each in executions), DECIDE_SECONDS)
        for execution in executions:
            execution.leave()
        await self._all((each.decided for each in executions), DECIDE_SECONDS)
        await self._all((each.parted for each in executions), self._rules.stop_grace_seconds)
        await self._let_go(executions)

    async def _let_go(self, executions: Collection[Execution]) -> None:
        """Leave all jobs and the launcher, even if some jobs are still being removed there.

        Ends that clients know are recorded. The next service removes ended jobs that the launcher
        still has.
        """
        for execution in executions:
            execution.leave(anyway=True)
        await self._all((each.over for each in executions), REMOVE_SECONDS)
        open_ones = [str(each.record.id) for each in executions if not each.over.is_set()]
        if self._launcher.silent:
            log.error("the launcher does not answer; it is left as it is")
        elif open_ones:
            log.error("the launcher has not forgotten these jobs yet: %s", ", ".join(open_ones))
        self._launcher.give_up()
        for execution in executions:
            await execution.over.wait()

    async def _all(self, events: Iterable[Waitable], seconds: float) -> None:
        """Wait for all events, but at most so many seconds and while the launcher answers."""
        with trio.move_on_after(seconds), suppress(LauncherSilent):
            for event in events:
                await self._launcher.wait_unless_silent(event)
