"""What may happen to jobs and their services: one rule each, in any order."""

import math
import signal
from functools import partial
from typing import get_args

import trio
import trio.testing
from attrs import frozen
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from jobworker.errors import JobworkerError, LauncherSilent, NotFound
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.model.access import Quota
from jobworker.model.job import JobId, JobSpec, Limits, OutputPolicy
from jobworker.sandbox.cgroup.accounting import Want

from .failing_disks import HistoryFault, OutputFault
from .kept_launcher import Manner
from .lifecycle_world import Kill, LifecycleWorld, Mishap, has_service
from .played_program import Behaviour, OnSignal, Program, Start
from .played_service import RULES, PlayedService
from .told import Told

QUOTA = Quota(jobs=4)
WHICH = st.integers(0, 9)
GRACES = st.sampled_from([None, 0.0, 2.0, 1e6])
WAITS = st.sampled_from([0.5, 1.5, 4.0, 12.0, 70.0])
KILLS = st.builds(Kill, turns=st.none() | st.integers(0, 60), keeps_jobs=st.booleans())
MISHAPS = st.none() | st.builds(
    Mishap,
    history=st.sampled_from(get_args(HistoryFault)),
    output=st.sampled_from(get_args(OutputFault)),
    launcher=st.sampled_from(get_args(Manner)),
    kill=st.none() | KILLS,
)


@frozen
class Wanted:
    """What a client wants to run."""

    owner: str = "alice"
    starts: tuple[Start, ...] = ()
    on_signal: OnSignal = "exits"
    output_bytes: int = 0
    timeout_seconds: float = 0.0
    at_max_output: OutputPolicy = "discard-output"


REQUESTS = st.builds(
    Wanted,
    owner=st.sampled_from(["alice", "bob"]),
    starts=st.just(()) | st.lists(st.sampled_from(get_args(Start)), max_size=2).map(tuple),
    on_signal=st.sampled_from(get_args(OnSignal)),
    output_bytes=st.sampled_from([0, 50]),
    timeout_seconds=st.sampled_from([0.0, 3.0]),
    at_max_output=st.sampled_from(get_args(OutputPolicy)),
)
KILL_SLACK_SECONDS = 1.5
"""A kill that was refused is tried again after a second."""
STOP_SLACK_SECONDS = 60.0
"""A start may have to be given up first, and records waited for that were on their way."""


class ClientRules(LifecycleWorld):
    """What clients ask for."""

    @initialize(wanted=st.lists(REQUESTS, min_size=1, max_size=3))
    def begin_with_jobs(self, wanted: list[Wanted]) -> None:
        """Nothing can happen to none."""
        self.begin()
        for each in wanted:
            self.admit(wanted=each)

    @precondition(has_service)
    @rule(wanted=REQUESTS, mishap=MISHAPS)
    def admit(self, wanted: Wanted, mishap: Mishap | None = None) -> None:
        self.befall(mishap)
        request = f"request-{len(self.behaviours)}"
        self.behaviours[request] = Behaviour(
            starts=list(wanted.starts),
            on_signal=wanted.on_signal,
            timeout_seconds=wanted.timeout_seconds,
        )
        spec = JobSpec(
            command=(request,),
            name=request,
            limits=Limits(output_bytes=wanted.output_bytes),
            timeout_seconds=wanted.timeout_seconds,
            at_max_output=wanted.at_max_output,
        )

        async def submit(service: PlayedService) -> None:
            try:
                execution = await service.supervisor.submit(spec, wanted.owner, QUOTA)
            except LauncherSilent as error:
                if "job" not in error.data:
                    raise
                job = JobId(int(str(error.data["job"])))
                service.told.take_id(request, job)
            else:
                job = execution.record.id
                service.told.admitted(request, execution.live_record.now())
            await self.hear_end(job, service)

        def refused(told: Told, error: JobworkerError) -> None:
            if request in told.ids:
                self.check_refusal(told.ids[request], told, error)
            else:
                told.refuse(request, error)

        self.ask(submit, refused)

    async def hear_end(self, job: JobId, service: PlayedService) -> None:
        record = await service.supervisor.wait(job)
        assert record.ended
        service.told.hear(record)

    def check_refusal(self, job: JobId, told: Told, error: JobworkerError) -> None:
        """Of a call about a job that was admitted."""
        if isinstance(error, NotFound):
            assert job in told.removing, f"job {job} is lost: {error}"

    @precondition(lambda self: has_service(self) and self.told.ids)
    @rule(
        which=WHICH,
        number=st.sampled_from([signal.SIGTERM, signal.SIGKILL]),
        grace_seconds=GRACES,
        mishap=MISHAPS,
    )
    def stop(
        self,
        which: int,
        number: signal.Signals,
        grace_seconds: float | None,
        mishap: Mishap | None,
    ) -> None:
        self.befall(mishap)
        job = self.job(which)
        grace = RULES.stop_grace_seconds if grace_seconds is None else grace_seconds
        self.told.ask_to_stop(job, grace)

        async def stop(service: PlayedService) -> None:
            service.stopping[job] += 1
            try:
                record = await service.supervisor.stop(job, number, grace_seconds)
            finally:
                service.stopping[job] -= 1
            assert record.ended
            service.told.hear(record)

        self.ask(stop, partial(self.check_refusal, job))

    @precondition(lambda self: has_service(self) and self.told.ids)
    @rule(which=WHICH, force=st.booleans(), mishap=MISHAPS)
    def remove(self, which: int, force: bool, mishap: Mishap | None) -> None:
        self.befall(mishap)
        job = self.job(which)
        self.told.removing.add(job)
        if force:
            self.told.stopped.add(job)

        async def remove(service: PlayedService) -> None:
            await service.supervisor.remove(job, force=force)
            service.told.removed.add(job)

        self.ask(remove, partial(self.check_refusal, job))

    @precondition(lambda self: has_service(self) and self.told.ids)
    @rule(which=WHICH, max_jobs=st.none() | st.integers(0, 2))
    def follow_and_prune(self, which: int, max_jobs: int | None) -> None:
        job = self.job(which)

        async def follow(service: PlayedService) -> None:
            self.check_output(job, await service.read_output(job))

        self.ask(follow, lambda _told, _error: None)
        if max_jobs is not None and has_service(self):
            self.told.pruned = True
            policy = RetentionPolicy(max_jobs=max_jobs)
            self.ask(
                lambda service: service.supervisor.prune(policy, None), lambda _told, _error: None
            )


class JobRules(ClientRules):
    """What programs do."""

    def some_program(self, which: int) -> Program | None:
        """One that is alive; if there is none, a client runs another."""
        if not self.launcher.alive():
            self.admit(wanted=Wanted(output_bytes=50 * (which % 2)))
        alive = self.launcher.alive()
        return alive[which % len(alive)] if alive else None

    @precondition(has_service)
    @rule(
        which=WHICH,
        stream=st.integers(0, 1),
        counts=st.lists(st.integers(1, 100), min_size=1, max_size=3),
        mishap=MISHAPS,
    )
    def write(self, which: int, stream: int, counts: list[int], mishap: Mishap | None) -> None:
        program = self.some_program(which)
        self.befall(mishap)
        if program is None:
            return

        async def write() -> None:
            for count in counts:
                if program.exit is None:  # else the first was too much
                    program.write(stream, count)
                await trio.testing.wait_all_tasks_blocked()

        self.do(write)

    @precondition(has_service)
    @rule(
        which=WHICH,
        last_words=st.integers(0, 60),
        how=st.sampled_from(
            [(0, None, ""), (1, None, ""), (None, signal.SIGSEGV, ""), (None, 9, "limit")]
        ),
        mishap=MISHAPS,
    )
    def exit(
        self,
        which: int,
        last_words: int,
        how: tuple[int | None, int | None, Want],
        mishap: Mishap | None,
    ) -> None:
        program = self.some_program(which)
        self.befall(mishap)
        if program is None:
            return

        def end() -> None:
            if program.exit is None:
                program.write(0, last_words)
                self.launcher.end(program, *how)

        self.do_now(end)

    @precondition(lambda self: self.launcher.hanging())
    @rule(which=WHICH)
    def finish_start(self, which: int) -> None:
        hanging = self.launcher.hanging()
        self.do_now(lambda: self.launcher.finish_start(hanging[which % len(hanging)]))


class FaultRules(LifecycleWorld):
    """Time, and what fails meanwhile."""

    @rule(seconds=WAITS, mishap=MISHAPS)
    def pass_time(self, seconds: float, mishap: Mishap | None) -> None:
        self.befall(mishap)
        self.do(partial(trio.sleep, seconds))

    def mend(self) -> None:
        self.disks.mend()
        self.do_now(lambda: self.launcher.behave("answers"))

    @precondition(has_service)
    @rule(kill=KILLS)
    def kill_at_once(self, kill: Kill) -> None:
        self.kill = kill
        self.do_now(lambda: None)

    @precondition(has_service)
    @rule()
    def see_stops(self) -> None:
        """Where nothing fails, who was asked to end has soon ended, whichever service was asked."""
        service = self.service
        assert service is not None
        self.kill = None
        self.mend()

        async def wait() -> None:
            asked = [
                execution
                for job, execution in service.supervisor._live.items()
                if (service.stopping[job] or execution.record.stop_requested_at is not None)
                and self.told.longest_grace.get(job, math.inf) <= RULES.stop_grace_seconds
            ]
            await trio.sleep(RULES.stop_grace_seconds + STOP_SLACK_SECONDS)
            for execution in asked:
                assert execution.ended.is_set(), f"a stop is forgotten: {execution.record}"

        self.do(wait)

    @precondition(has_service)
    @rule()
    def see_time_outs(self) -> None:
        """Where nothing fails, a job with a time-out ends in time, whichever service began it."""
        self.kill = None
        self.mend()

        async def wait() -> None:
            now = trio.current_time()
            limited = [
                (program, program.since + seconds)
                for program in self.launcher.alive()
                if (seconds := self.behaviours[program.request].timeout_seconds)
            ]
            longest = max((max(due, now) for _, due in limited), default=now)
            await trio.sleep_until(longest + RULES.stop_grace_seconds + KILL_SLACK_SECONDS)
            for program, _ in limited:
                assert program.exit is not None, f"job {program.job} has no time-out any more"

        self.do(wait)
