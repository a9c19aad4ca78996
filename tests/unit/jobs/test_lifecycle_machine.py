"""Supervisor, execution and takeover against what clients were told, whatever fails and when.

History and output are real files, the pipes are the kernel's; the launcher is played
(`kept_launcher`), and the disks refuse when a rule says so (`failing_disks`). Each example is one
Trio run on a mock clock, over as many services as its rules start.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jobworker.errors import JobworkerError, LauncherSilent, NotFound
from jobworker.jobs.retention import Policy
from jobworker.model.access import Quota
from jobworker.model.job import JobId, JobSpec, Limits, OutputPolicy
from jobworker.sandbox.cgroup.scope import Want

from .failing_disks import Disks, HistoryFault
from .kept_launcher import Behaviour, KeptLauncher, Manner, OnSignal, Program, Start
from .output.test_spool import open_fds
from .played_service import PlayedService
from .stepped_trio import SteppedTrio
from .told import Told

SOAK = bool(os.environ.get("JOBWORKER_SOAK"))
IN_MEMORY = Path("/dev/shm")
PATIENCE_SECONDS = 300.0
"""In which every client is answered once the faults are gone, by the mock clock."""
QUOTA = Quota(jobs=4)
WHICH = st.integers(0, 9)
GRACES = st.sampled_from([None, 0.0, 2.0, 1e6])
WAITS = st.sampled_from([0.5, 1.5, 4.0, 12.0, 70.0])


def has_service(machine: "LifecycleMachine") -> bool:
    return machine.service is not None and not machine.service.leaving


class LifecycleMachine(RuleBasedStateMachine):
    """Services over one directory and one launcher at a time, in any order of events."""

    service: PlayedService | None = None

    @initialize()
    def begin(self) -> None:
        self.open_before = open_fds()
        self.directory = Path(tempfile.mkdtemp(dir=IN_MEMORY if IN_MEMORY.is_dir() else None))
        (self.directory / "spool").mkdir()
        self.patch, self.disks, self.told = pytest.MonkeyPatch(), Disks(), Told()
        self.disks.install(self.patch)
        logging.disable(logging.CRITICAL)  # thousands of lines, of faults that are meant
        self.behaviours: dict[str, Behaviour] = {}
        self.executed: list[Program] = []
        self.launcher = KeptLauncher(self.behaviours, self.executed)
        self.run = SteppedTrio()
        self.start_service()

    def do(self, step: Callable[[], Awaitable[object]]) -> None:
        """Run a step and what follows from it at once."""

        async def settled() -> None:
            await step()
            await trio.testing.wait_all_tasks_blocked()

        self.run.do(settled)

    def do_now(self, step: Callable[[], object]) -> None:
        async def at_once() -> None:
            step()
            await trio.lowlevel.checkpoint()

        self.do(at_once)

    def ask(
        self,
        call: Callable[[PlayedService], Awaitable[object]],
        refused: Callable[[JobworkerError], object],
    ) -> None:
        """Make a call as a client of the service."""
        service = self.service
        assert service is not None
        self.do_now(lambda: service.ask(partial(call, service), refused))

    # --- clients ----------------------------------------------------------------------------

    @precondition(has_service)
    @rule(
        owner=st.sampled_from(["alice", "bob"]),
        starts=st.just([]) | st.lists(st.sampled_from(get_args(Start)), max_size=2),
        on_signal=st.sampled_from(get_args(OnSignal)),
        output_bytes=st.sampled_from([0, 0, 50]),
        timeout_seconds=st.sampled_from([0.0, 0.0, 3.0]),
        at_max_output=st.sampled_from(get_args(OutputPolicy)),
    )
    def admit(
        self,
        owner: str,
        starts: list[Start],
        on_signal: OnSignal,
        output_bytes: int,
        timeout_seconds: float,
        at_max_output: OutputPolicy,
    ) -> None:
        request = f"request-{len(self.behaviours)}"
        self.behaviours[request] = Behaviour(starts=list(starts), on_signal=on_signal)
        spec = JobSpec(
            command=(request,),
            name=request,
            limits=Limits(output_bytes=output_bytes),
            timeout_seconds=timeout_seconds,
            at_max_output=at_max_output,
        )

        async def submit(service: PlayedService) -> None:
            try:
                execution = await service.supervisor.submit(spec, owner, QUOTA)
            except LauncherSilent as error:
                if "job" not in error.data:
                    raise
                job = JobId(int(str(error.data["job"])))
                self.told.ids[request] = job
            else:
                job = execution.record.id
                self.told.admitted(request, execution.record_now())
            await self.hear_end(job, service)

        def refused(error: JobworkerError) -> None:
            if request in self.told.ids:
                self.check_refusal(self.told.ids[request], error)
            else:
                self.told.refused[request] = str(error)

        self.ask(submit, refused)

    async def hear_end(self, job: JobId, service: PlayedService) -> None:
        record = await service.supervisor.wait(job)
        assert record.ended
        self.told.hear(record)

    def job(self, which: int) -> JobId:
        jobs = sorted(self.told.ids.values())
        return jobs[which % len(jobs)]

    def check_refusal(self, job: JobId, error: JobworkerError) -> None:
        """Of a call about a job that was admitted."""
        if isinstance(error, NotFound):
            assert job in self.told.removing, f"job {job} is lost: {error}"

    @precondition(lambda self: has_service(self) and self.told.ids)
    @rule(
        which=WHICH, number=st.sampled_from([signal.SIGTERM, signal.SIGKILL]), grace_seconds=GRACES
    )
    def stop(self, which: int, number: signal.Signals, grace_seconds: float | None) -> None:
        job = self.job(which)
        self.told.stopped.add(job)

        async def stop(service: PlayedService) -> None:
            record = await service.supervisor.stop(job, number, grace_seconds)
            assert record.ended
            self.told.hear(record)

        self.ask(stop, partial(self.check_refusal, job))

    @precondition(lambda self: has_service(self) and self.told.ids)
    @rule(which=WHICH)
    def follow(self, which: int) -> None:
        job = self.job(which)

        async def follow(service: PlayedService) -> None:
            self.check_output(job, await service.read_output(job))

        self.ask(follow, lambda _: None)

    @precondition(lambda self: has_service(self) and self.told.ids)
    @rule(which=WHICH, force=st.booleans())
    def remove(self, which: int, force: bool) -> None:
        job = self.job(which)
        self.told.removing.add(job)
        if force:
            self.told.stopped.add(job)

        async def remove(service: PlayedService) -> None:
            await service.supervisor.remove(job, force=force)
            self.told.removed.add(job)

        self.ask(remove, partial(self.check_refusal, job))

    @precondition(has_service)
    @rule(max_jobs=st.integers(0, 2))
    def prune(self, max_jobs: int) -> None:
        self.told.pruned = True
        policy = Policy(max_jobs=max_jobs)
        self.ask(lambda service: service.supervisor.prune(policy, None), lambda _: None)

    # --- jobs -------------------------------------------------------------------------------

    @precondition(lambda self: self.launcher.alive())
    @rule(which=WHICH, stream=st.integers(0, 1), count=st.integers(1, 60))
    def write(self, which: int, stream: int, count: int) -> None:
        alive = self.launcher.alive()
        self.do_now(lambda: alive[which % len(alive)].write(stream, count))

    @precondition(lambda self: self.launcher.alive())
    @rule(
        which=WHICH,
        last_words=st.integers(0, 60),
        how=st.sampled_from(
            [(0, None, ""), (1, None, ""), (None, signal.SIGSEGV, ""), (None, 9, "limit")]
        ),
    )
    def exit(self, which: int, last_words: int, how: tuple[int | None, int | None, Want]) -> None:
        alive = self.launcher.alive()
        program = alive[which % len(alive)]

        def end() -> None:
            program.write(0, last_words)
            self.launcher.end(program, *how)

        self.do_now(end)

    @precondition(lambda self: self.launcher.hanging())
    @rule(which=WHICH)
    def finish_start(self, which: int) -> None:
        hanging = self.launcher.hanging()
        self.do_now(lambda: self.launcher.finish_start(hanging[which % len(hanging)]))

    # --- time and faults --------------------------------------------------------------------

    @rule(seconds=WAITS)
    def pass_time(self, seconds: float) -> None:
        self.do(partial(trio.sleep, seconds))

    @rule()
    def mend(self) -> None:
        self.disks.mend()
        self.do_now(lambda: self.launcher.behave("answers"))

    @rule(fault=st.sampled_from(get_args(HistoryFault)[1:]))
    def change_history(self, fault: HistoryFault) -> None:
        self.disks.history = fault

    @rule(is_full=st.booleans())
    def change_output_disk(self, is_full: bool) -> None:
        self.disks.output_is_full, self.disks.output_is_lost = is_full, not is_full

    @precondition(lambda self: self.service is not None)
    @rule(manner=st.sampled_from(get_args(Manner)[1:]))
    def change_launcher(self, manner: Manner) -> None:
        self.do_now(lambda: self.launcher.behave(manner))

    # --- services ---------------------------------------------------------------------------

    @precondition(has_service)
    @rule(ends_jobs=st.booleans())
    def begin_to_leave(self, ends_jobs: bool) -> None:
        service = self.service
        assert service is not None
        if ends_jobs:
            self.told.stopped.update(service.supervisor._live)
        end = service.shut_down if ends_jobs else service.leave
        service.leaving = True
        self.do_now(lambda: self.run.nursery.start_soon(end))

    @precondition(lambda self: self.service is not None and self.service.leaving)
    @rule()
    def see_it_gone(self) -> None:
        async def wait() -> None:
            assert self.service is not None
            with trio.fail_after(PATIENCE_SECONDS):
                await self.service.gone.wait()

        self.do(wait)
        self.check_left()

    @precondition(has_service)
    @rule(ends_jobs=st.booleans(), keeps_jobs=st.booleans())
    def hand_over(self, ends_jobs: bool, keeps_jobs: bool) -> None:
        """The same at once."""
        self.begin_to_leave(ends_jobs=ends_jobs)
        self.see_it_gone()
        self.start_service(keeps_jobs=keeps_jobs)

    @precondition(has_service)
    @rule(notices=st.booleans())
    def kill_launcher(self, notices: bool) -> None:
        """The service ends as soon as it hears of that, or a moment later."""
        service = self.service
        assert service is not None

        async def die() -> None:
            self.launcher.die()
            if notices:
                await trio.testing.wait_all_tasks_blocked()
            await service.abort()

        self.do(die)
        self.launcher = KeptLauncher(self.behaviours, self.executed)
        self.check_incidents()
        self.service = None

    @precondition(lambda self: self.service is None)
    @rule(keeps_jobs=st.booleans())
    def start_service(self, keeps_jobs: bool = True) -> None:
        async def start() -> None:
            if not keeps_jobs:
                self.launcher.die()
                self.launcher = KeptLauncher(self.behaviours, self.executed)
            try:
                self.service = await self.start_one()
            except JobworkerError:
                self.disks.mend()
                self.service = await self.start_one()

        self.do(start)

    async def start_one(self) -> PlayedService:
        return await PlayedService.start(self.run.nursery, self.directory, self.launcher)

    def check_left(self) -> None:
        assert self.service is not None
        supervisor = self.service.supervisor
        assert (supervisor._live, supervisor._places_taken) == ({}, 0)
        self.check_incidents()
        self.service = None

    def check_incidents(self) -> None:
        assert self.service is not None
        assert self.service.incidents.statistics() == {}, "a fault that no code foresaw"

    # --- always -----------------------------------------------------------------------------

    @invariant()
    def nothing_told_is_unsaid(self) -> None:
        if self.service is None:
            return
        service, supervisor, told = self.service, self.service.supervisor, self.told
        self.check_incidents()
        assert supervisor._places_taken == len(supervisor._live) + len(supervisor._arriving)
        assert len(self.launcher.alive()) <= supervisor.max_running
        executed = [program.job for program in self.executed]
        assert len(executed) == len(set(executed)), "no job runs twice"
        requests = [program.request for program in self.executed]
        assert len(requests) == len(set(requests)), "no request runs twice"

        async def look() -> None:
            ended = set(told.ends) - told.removing
            told.see_list(await service.list_jobs(), ended)
            for job in ended:
                told.hear(await supervisor.record(job))

        if not service.gone.is_set():
            self.do(look)

    def check_output(self, job: JobId, found: dict[str, bytes]) -> None:
        program = self.program_of(job)
        wrote = program.wrote if program is not None else (b"", b"")
        for stream, data in zip(wrote, (found["stdout"], found["stderr"]), strict=True):
            assert bytes(stream[: len(data)]) == data

    def program_of(self, job: JobId) -> Program | None:
        return next((each for each in self.executed if each.job == job), None)

    # --- the end ----------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        try:
            if sys.exc_info()[0] is None:  # else a rule has failed, and that counts
                self.end_all()
        finally:
            self.run.close()
            self.patch.undo()
            logging.disable(logging.NOTSET)
            shutil.rmtree(self.directory)
        assert open_fds() == self.open_before

    def end_all(self) -> None:
        """All faults are gone: everybody is answered, and a last service finds what was told."""
        self.mend()
        if self.service is not None and self.service.leaving:
            self.see_it_gone()
        if self.service is None:
            self.start_service()
        self.end_jobs()
        self.begin_to_leave(ends_jobs=False)
        self.see_it_gone()
        self.start_service()
        self.nothing_told_is_unsaid()
        self.do(self.check_all)
        self.check_places()
        self.begin_to_leave(ends_jobs=True)
        self.see_it_gone()
        assert self.launcher.programs == {}

    def end_jobs(self) -> None:
        service = self.service
        assert service is not None

        async def end() -> None:
            for job in self.launcher.hanging():
                self.launcher.finish_start(job)
            with trio.fail_after(PATIENCE_SECONDS):
                while service.supervisor._live:
                    for job in list(service.supervisor._live):
                        self.told.stopped.add(job)
                        service.supervisor._live[job].request_stop(signal.SIGKILL, 0)
                    await trio.sleep(1)
            await service.wait_until_idle(PATIENCE_SECONDS)

        self.do(end)

    async def check_all(self) -> None:
        service = self.service
        assert service is not None
        await service.wait_until_idle(PATIENCE_SECONDS)
        listed = await service.list_jobs()
        names = {record.spec.name for record in listed.values()}
        assert not names & self.told.refused.keys(), "a job that was refused exists"
        with_output = set[str]()
        for job, record in listed.items():
            assert record.ended
            program = self.program_of(job)
            self.told.check_cause(record, program)
            self.told.check_sizes(record, program)
            if record.output_removed_at is not None:
                assert self.told.pruned or job in self.told.removing
                continue
            with_output.add(str(job))
            found = await service.read_output(job)
            self.check_output(job, found)
            sizes = (len(found["stdout"]), len(found["stderr"]))
            assert sizes == (record.stdout_bytes, record.stderr_bytes)
        assert set(os.listdir(self.directory / "spool")) == with_output
        assert service.budget.live_bytes == 0

    def check_places(self) -> None:
        """As many jobs run as ever, and an owner has its whole quota."""
        for _ in range(QUOTA.jobs):
            self.admit(
                owner="alice",
                starts=[],
                on_signal="exits",
                output_bytes=0,
                timeout_seconds=0.0,
                at_max_output="discard-output",
            )
        request = f"request-{len(self.behaviours) - 1}"
        assert request in self.told.ids, self.told.refused.get(request)
        assert len(self.launcher.alive()) == 2


LifecycleMachine.TestCase.settings = settings(
    max_examples=3000 if SOAK else 100,
    stateful_step_count=60 if SOAK else 40,
    deadline=None,
    database=None,
    derandomize=not SOAK,  # a fault that it finds is found again; the longer form looks further
    suppress_health_check=list(HealthCheck),
)
TestLifecycle = LifecycleMachine.TestCase
