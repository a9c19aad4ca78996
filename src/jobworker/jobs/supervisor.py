"""The supervisor: has all live jobs, runs each in an execution of its own, and finds it again.

Requests come in through `admission`, and `places` says which job runs and which waits. Memory has
live jobs only. Ended jobs are in the history and in the spool directory, so memory does not grow
with the number of all jobs.

`serve` owns the nursery of all executions. An unexpected fault of one execution is logged as an
incident and ends its job, and nothing else.
"""

import logging
import math
import signal
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path

import trio
from attrs import define, field

from jobworker.errors import Busy, JobworkerError, LauncherSilent, ShuttingDown
from jobworker.incidents import Incidents
from jobworker.jobs.admission import Admission
from jobworker.jobs.archive import Archive
from jobworker.jobs.execution import Execution
from jobworker.jobs.history.history import History
from jobworker.jobs.history.search import Filter, Page
from jobworker.jobs.inheritance import Takeover
from jobworker.jobs.live_record import RECORD_AGAIN_SECONDS
from jobworker.jobs.lookup import follow_from, page_of
from jobworker.jobs.output.batched_wakeups import BatchedEvent
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.index import BOTH
from jobworker.jobs.output.search import Start
from jobworker.jobs.places import Places
from jobworker.jobs.removals import Removals
from jobworker.jobs.retention_policy import EndedOutput, RetentionPolicy
from jobworker.jobs.rules import Clock, Rules
from jobworker.model.access import NO_QUOTA, Quota, no_such_job
from jobworker.model.job import JobId, JobRecord, JobSpec, Limits, Stream
from jobworker.sandbox.service.exchange import Waitable
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.sandbox.service.launcher_errors import launcher_silent

DECIDE_SECONDS = 5.0
"""How long the end of the service waits for starts that are under way, and then once more for the
launcher to give them up."""
KILL_SECONDS = 10.0
"""How long the end of the service waits for jobs after SIGKILL. The launcher waits as long."""
REMOVE_SECONDS = 3.0
"""How long the end of the service waits for the launcher to forget ended jobs."""
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
    _places: Places = field(init=False)
    _admission: Admission = field(init=False)
    _removals: Removals = field(factory=Removals, init=False)

    def __attrs_post_init__(self) -> None:
        self._places = Places(max_running=self.max_running, max_waiting=self.max_waiting)
        self._admission = Admission(
            launcher=self._launcher,
            history=self._history,
            archive=self._archive,
            spools=self._spools,
            rules=self._rules,
            clock=self._clock,
            places=self._places,
            live=self._live,
        )

    def take_over(self, inheritance: Takeover) -> None:
        """Go on with the jobs of an earlier service. Call it before `serve`."""
        self._admission.take_over(inheritance)

    async def serve(self) -> None:
        """Run the jobs that are submitted, in order. Never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._incidents.keep_running, "retention", self._archive.serve)
            while True:
                execution = await self._places.next()
                nursery.start_soon(self._accompany, execution)
                del execution  # or this frame would keep the last job after its end

    async def _accompany(self, execution: Execution) -> None:
        """Run one job, and then give its place to others."""
        try:
            await self._run(execution)
        except* Exception:  # noqa: BLE001 - recorded
            self._incidents.record("job", f"the end of job {execution.record.id}")
        finally:
            self._places.finished(execution)

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
                try:
                    if execution.ended.is_set():
                        await self._archive.add(execution)
                finally:
                    await execution.settle()
                if execution.refused:
                    await self._take_back(execution.record.id)
                if execution.ended.is_set():
                    await execution.settlement.finish()
                if execution.settlement.is_gone:
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
        self._places.give_back()
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
        execution = await self._admission.admit(spec, owner, quota, longest_seconds=longest_seconds)
        if execution.admitted_at_once:
            await self._wait_for(execution, execution.decided)
        return execution

    async def _wait_for(self, execution: Execution, event: trio.Event | BatchedEvent) -> None:
        """Wait for an event of a job. Raises LauncherSilent if the launcher does not answer."""
        try:
            await self._launcher.wait_unless_silent(event)
        except LauncherSilent:
            raise launcher_silent(execution.record.id) from None

    async def plan(self, spec: JobSpec) -> tuple[Limits, list[tuple[str, str, str]]]:
        """Return the limits of a job, with defaults filled in, and the steps of its start.

        Starts nothing. Raises the errors that would refuse the job before its first step.
        """
        return await self._admission.plan(spec)

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
            return execution.live_record.now()
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
            self._places.end_without_a_place(execution)
            await self._wait_for(execution, execution.parted)
        return await self.wait(job, who)

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
        without `force` Busy if the job is live or its output is being followed. Raises ShuttingDown
        if the job is left to the next service.
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
        await self._ended(job, who)  # a job that was left is not live here, and has not ended
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
            if execution.ended.is_set() and owner in (None, execution.record.owner):
                await execution.archived.wait()
        return await self._archive.prune(policy, owner=owner)

    async def shut_down(self, grace_seconds: float) -> None:
        """Admit no more jobs, stop every job, and wait for the ends.

        Jobs that have not ended `KILL_SECONDS` after the grace period are left.
        """
        await self._admission.close()
        executions = list(self._live.values())
        for execution in executions:
            execution.end_with_service(grace_seconds)
            self._places.end_without_a_place(execution)
        await self._all((each.parted for each in executions), grace_seconds + KILL_SECONDS)
        await self._let_go(executions)

    async def leave(self) -> None:
        """Admit no more jobs, and leave all jobs to the next service.

        Starts that are under way get `DECIDE_SECONDS` to finish, and jobs that are being stopped
        the usual grace period. The next service goes on with those that are undecided then.
        """
        await self._admission.close()
        for waiting in self._places.take_out_waiting():
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
