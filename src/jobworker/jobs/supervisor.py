"""The supervisor: admits jobs, runs each in an execution of its own, and finds them again.

At most `max_running` jobs run; more wait (`waiting_room`), up to `max_waiting`, after which a
request is refused at once. Live jobs stand in memory, ended ones only in the history and the spool
directory, so memory does not grow with the number of jobs ever run.

`serve` owns the nursery of all executions. One execution's unexpected fault ends that job, with
an incident id in the log, and nothing else.
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
from jobworker.jobs.retention import EndedOutput, RetentionPolicy
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
"""What starts under way get at the end of the service, and the launcher to give them up."""
KILL_SECONDS = 10.0
"""What jobs get to be gone after SIGKILL: as the launcher gives them at its own end."""
REMOVE_SECONDS = 3.0
"""What the launcher gets to take back what ended jobs had."""
_NOT_YET = JobId(1)
"""Stands for the number that a job would get."""
log = logging.getLogger("jobworker.jobs")


def _left(job: JobId) -> ShuttingDown:
    return ShuttingDown(f"cannot reach job {job}: it is left to the next service")


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
    """Those that need not wait for a place: they have one, or only have to be ended."""
    _promised: int = field(default=0, init=False)
    """Places of jobs that were admitted at once and are not queued yet: nobody may take them."""
    _change: trio.Event = field(factory=trio.Event, init=False)
    """Set when a job has come to wait, or a place has become free."""
    _places_taken: int = field(default=0, init=False)
    _arriving: dict[JobId, tuple[str, Limits, Secrets]] = field(factory=dict, init=False)
    """Owner, limits and secrets of jobs that were admitted and are not live yet."""
    _undecided: int = field(default=0, init=False)
    """Admissions under way: until the first record of each is on the disk, or was refused."""
    _all_decided: trio.Event = field(factory=trio.Event, init=False)
    _closing: bool = field(default=False, init=False)
    _removals: Removals = field(factory=Removals, init=False)

    def __attrs_post_init__(self) -> None:
        self._pending = WaitingRoom(self.max_waiting)

    def take_over(self, inheritance: Takeover) -> None:
        """Go on with the jobs of an earlier service: before `serve`."""
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
        """Run what is submitted, in order; never returns."""
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
        """Run one job; the boundary for faults of its own."""
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
        """Remove what is left of a job that its client was told was not admitted.

        What stays for the disk's sake is noted as refused, so that the next service removes it.
        """
        while True:
            # Once at least, also where the service ends.
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
        """Admit a job. Returns once it is recorded and either runs, has failed to, or waits.

        `longest_seconds` bounds the time that one gets which names none.

        Raises Busy if too many wait already, QuotaExceeded, ShuttingDown at the end of the service,
        and TooLarge. Once admitted the job goes on, whatever becomes of the caller.
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
        # From here to where the job is counted there is no checkpoint: two requests cannot both
        # have the last place.
        check_quota(quota, self._use_of(owner), spec.limits)
        check_room(secrets, self._secrets_beside(owner))
        self._undecided += 1
        try:
            with trio.CancelScope(shield=True):  # bounded by the disk; a job is admitted or not
                execution = await self._admit(spec, owner, longest_seconds, secrets)
        finally:
            self._undecided -= 1
            if not self._undecided:
                self._all_decided.set()
        if execution.admitted_at_once:
            await self._hear_of(execution, execution.decided)
        return execution

    async def _hear_of(self, execution: Execution, event: trio.Event | BatchedEvent) -> None:
        """Wait for an event of a job's. Raises LauncherSilent where it may be long in coming."""
        try:
            await self._launcher.wait_unless_silent(event)
        except LauncherSilent:
            raise launcher_silent(execution.record.id) from None

    def _check_room(self, owner: str) -> None:
        """Raise Busy where neither may a job of this owner run at once nor wait."""
        beyond = self._places_taken - self.max_running
        arriving = sum(name == owner for name, _, _ in self._arriving.values())
        if beyond < 0 or self._pending.has_room_for(owner, taken=beyond, arriving=arriving):
            return
        if beyond >= self.max_waiting:
            why = f"{self.max_running} jobs run and {self.max_waiting} wait already"
        else:
            why = f"{beyond} jobs wait, and the last places are for those who have few waiting"
        raise Busy(
            f"cannot run the command: {why}",
            remedy="try again later, or raise worker.max_concurrent_jobs or max_waiting_jobs",
        )

    async def plan(self, spec: JobSpec) -> tuple[Limits, list[tuple[str, str, str]]]:
        """A job's limits, defaults filled in, and the steps of its start; nothing is started.

        Raises what would refuse it before its first step.
        """
        spec.check_size()
        await trio.lowlevel.checkpoint()
        full = evolve_unchecked(spec, limits=spec.limits.or_defaults(self._rules.defaults))
        steps = await self._launcher.plan(order_of(full, _NOT_YET, {}), limits_of(full))
        return full.limits, steps

    def _use_of(self, owner: str) -> QuotaUse:
        """What an owner has."""
        mine = [e for e in self._live.values() if e.record.owner == owner]
        live = [e.record.spec.limits for e in mine if not e.ended.is_set()]
        live += [limits for name, limits, _ in self._arriving.values() if name == owner]
        return QuotaUse(tuple(live), self._archive.size_of(owner) + output_of(mine))

    def _secrets_beside(self, owner: str) -> Iterator[tuple[bool, Secrets]]:
        """The secrets of all jobs, each with whether they are this owner's."""
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
        if at_once:  # PENDING is what stands in the history of a job that has never run
            record = evolve(record, state=advance(record.state, Event.ADMIT))
        self._arriving[job] = owner, spec.limits, secrets
        try:
            spool = await in_thread(self._make_spool, record)
        except BaseException:
            self._places_taken -= 1
            raise
        finally:
            del self._arriving[job]  # it is live, or will not be
            self._promised -= at_once
            self._change.set()
        execution = self._make_execution(record, spool, at_once)
        execution.secrets = secrets
        execution.admission = trio.Event()
        self._queue(execution)
        try:
            # While the job starts: both take a while.
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
        """Note on the disk that a job is refused, before its client hears of that.

        Else the next service, were this one killed now, would take it for one that was admitted.
        """
        try:
            await in_thread(note_refusal, self._spools, job)
        except JobworkerError as error:
            log.error("job %d is refused, and no disk takes the note of that: %s", job, error)

    def _make_spool(self, record: JobRecord) -> Spool:
        """Make the place of a job's output, and note there whose it is: in a thread."""
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
        """The execution of a job that has not ended."""
        return self._live.get(job)

    async def record(self, job: JobId, who: str = "") -> JobRecord:
        """A job's record as it is now; of one that has ended its summary. Raises NotFound.

        `who` asks, here and below: the questions of others take turns with theirs.
        """
        execution = self._live.get(job)
        if execution is not None:
            return execution.record_now()
        record = await self._history.summary(job, who)
        if record is None:
            raise no_such_job(job)
        return await self._archive.look_after(record)

    async def spec_of(self, job: JobId, who: str) -> str | None:
        """The JSON of the whole request of a job whose stored summary is abridged, or None."""
        return await self._history.spec(job, who)

    async def latest(self, wanted: Filter, limit: int, who: str) -> Page:
        """At most `limit` summaries that fit, newest first, as JSON, and where to go on."""
        before = dict(self._live)
        stored = await self._history.page(wanted, limit, who)
        # Those included that have ended since: the page may be of the moment before.
        return await page_of({**before, **self._live}, stored, wanted, limit)

    async def stop(
        self, job: JobId, number: signal.Signals, grace_seconds: float | None, who: str = ""
    ) -> JobRecord:
        """Stop a job and wait for its end; one that has ended is left as it is.

        Raises NotFound, and ShuttingDown where it is left to the next service meanwhile.
        """
        execution = self._live.get(job)
        if execution is not None:
            execution.request_stop(number, grace_seconds)
            self._end_without_a_place(execution)
            await self._hear_of(execution, execution.parted)
        return await self.wait(job, who)

    def _end_without_a_place(self, execution: Execution) -> None:
        if execution in self._pending:
            self._pending.remove(execution)
            self._placed.append(execution)
            self._change.set()

    async def wait(self, job: JobId, who: str = "") -> JobRecord:
        """Wait for a job's end. Raises NotFound, and ShuttingDown where it is left meanwhile."""
        execution = self._live.get(job)
        if execution is not None:
            await execution.parted.wait()
            if not execution.ended.is_set():
                raise _left(job)
            return execution.record
        return await self._ended(job, who)

    async def _ended(self, job: JobId, who: str) -> JobRecord:
        """The record of a job that is not live. Raises NotFound."""
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
        """A follower of a job's output, live or ended; the caller closes it.

        Raises NotFound, and InvalidParams where the output is shorter than `start.offset`.
        """
        execution = self._live.get(job)
        if execution is not None and not execution.ended.is_set():
            return await follow_from(execution.spool, start, streams, coalesce)
        async with self._archive.reading(await self._ended(job, who)) as spool:
            return await follow_from(spool, start, streams, coalesce)

    async def remove(self, job: JobId, *, force: bool, who: str = "") -> int:
        """Remove an ended job, output and record: bytes freed. `force` kills a live one first.

        Raises NotFound, and Busy where it is alive or its output is being followed.
        """
        with self._removals.marked(job) if force else nullcontext():
            return await self._remove(job, force=force, who=who)

    def is_being_removed(self, job: JobId) -> bool:
        """Whether a job is being removed by force: its followers get no end of it any more."""
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
        """Apply a policy (None: the configured one) to ended jobs' output: what went.

        To that of `owner` alone, where one is given. What was told to have ended counts, though the
        archive may only just take it up.
        """
        for execution in list(self._live.values()):
            if execution.ended.is_set():
                await execution.archived.wait()
        if owner is None:
            return await self._archive.prune(policy)
        own = await self._history.with_output_of(owner)
        return await self._archive.prune(policy, only=own.__contains__)

    async def _close(self) -> None:
        """Take nothing more; returns once it is known of each job whether it was admitted.

        A refused one is then on its way to its end. Bounded by the disk.
        """
        self._closing = True
        if self._undecided:
            self._all_decided = trio.Event()
            await self._all_decided.wait()

    async def shut_down(self, grace_seconds: float) -> None:
        """Take nothing more, stop every job and wait for the ends, if they come in time."""
        await self._close()
        executions = list(self._live.values())
        for execution in executions:
            execution.end_with_service(grace_seconds)
            self._end_without_a_place(execution)
        await self._all((each.parted for each in executions), grace_seconds + KILL_SECONDS)
        await self._let_go(executions)

    async def leave(self) -> None:
        """Take nothing more, and let go of every job.

        Those that start get some time for it, and those that are being stopped the usual grace.
        What is undecided then is left to the next service.
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
        """Have nothing more to do with jobs and launcher, whatever is still open between them.

        An end that was told is recorded, and what the launcher has not forgotten by then is removed
        by the next service.
        """
        for execution in executions:
            execution.leave(anyway=True)
        await self._all((each.over for each in executions), REMOVE_SECONDS)
        open_ones = [str(each.record.id) for each in executions if not each.over.is_set()]
        if self._launcher.silent:
            log.error("the launcher does not answer; it is left as it is")
        elif open_ones:
            log.error("left with the launcher still busy with them: jobs %s", ", ".join(open_ones))
        self._launcher.give_up()
        for execution in executions:
            await execution.over.wait()

    async def _all(self, events: Iterable[Waitable], seconds: float) -> None:
        """Wait for all events for so many seconds at most, and as long as the launcher answers."""
        with trio.move_on_after(seconds), suppress(LauncherSilent):
            for event in events:
                await self._launcher.wait_unless_silent(event)
