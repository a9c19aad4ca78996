"""Supervisor, execution and takeover against what clients were told, whatever fails and when.

A service may be left, killed at any turn of its event loop, or never come to its start; the next
one has the disk and the launcher (`lifecycle_world`), and must not unsay what was said (`told`).
"""

import os
import signal
import sys

import trio
import trio.testing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from .kept_launcher import KeptLauncher
from .lifecycle_rules import KILLS, MISHAPS, QUOTA, FaultRules, JobRules, Wanted
from .lifecycle_world import Kill, Mishap, has_service
from .output.written_logs import open_fds
from .played_service import now

SOAK = bool(os.environ.get("JOBWORKER_SOAK"))
PATIENCE_SECONDS = 300.0
"""In which every client is answered once the faults are gone, by the mock clock."""


class LifecycleMachine(JobRules, FaultRules):
    """Services over one directory and one launcher at a time, in any order of events."""

    # --- services ---------------------------------------------------------------------------

    @precondition(has_service)
    @rule(ends_jobs=st.booleans(), mishap=MISHAPS)
    def begin_to_leave(self, ends_jobs: bool, mishap: Mishap | None = None) -> None:
        self.befall(mishap)
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
        self.kill = None

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
        self.kill = None
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
            self.told.expect_kill(service.supervisor, self.launcher, self.disks.output_was_full)
            self.told.expect_loss(now())
            self.launcher.die()
            if notices:
                await trio.testing.wait_all_tasks_blocked()
            await service.abort()

        self.kill = None
        self.do(die)
        self.launcher = KeptLauncher(self.behaviours, self.executed)
        self.check_incidents()
        self.service = None

    @precondition(lambda self: self.service is None)
    @rule(keeps_jobs=st.booleans(), kill=st.none() | KILLS)
    def start_next(self, keeps_jobs: bool, kill: Kill | None) -> None:
        self.kill = kill
        self.start_service(keeps_jobs=keeps_jobs)

    # --- always -----------------------------------------------------------------------------

    @invariant()
    def nothing_told_is_unsaid(self) -> None:
        if self.service is None:
            return
        service, supervisor, told = self.service, self.service.supervisor, self.told
        self.check_incidents()
        arriving = supervisor._admission._arriving
        assert supervisor._places.taken == len(supervisor._live) + len(arriving)
        assert len(self.launcher.alive()) <= supervisor.max_running
        executed = [program.job for program in self.executed]
        assert len(executed) == len(set(executed)), "no job runs twice"
        requests = [program.request for program in self.executed]
        assert len(requests) == len(set(requests)), "no request runs twice"

        kill, self.kill = self.kill, None

        async def look() -> None:
            ended = set(told.ends) - told.removing
            listed = await service.list_jobs()
            if service.answers:
                told.see_list(listed, ended)
            for job in ended:
                record = await supervisor.record(job)
                if service.answers:
                    told.hear(record)

        if service.answers:
            self.do(look)
        self.kill = kill

    # --- the end ----------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        has_failed = sys.exc_info()[0] is not None  # a rule has, and that counts
        try:
            if not has_failed:
                self.end_all()
        finally:
            self.close()
        left = open_fds().items() - self.open_before.items()
        assert has_failed or not left, f"open still: {left}"

    def end_all(self) -> None:
        """All faults are gone: everybody is answered, and a last service finds what was told."""
        self.kill = None
        self.mend()
        if self.service is not None and self.service.leaving:
            self.see_it_gone()
        if self.service is None:
            self.start_service()
        self.see_stops()
        self.see_time_outs()
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
            if job not in self.told.removing:  # a removal that a kill cut short may have begun
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
            self.admit(wanted=Wanted())
        request = f"request-{len(self.behaviours) - 1}"
        assert request in self.told.ids, self.told.refused.get(request)
        assert len(self.launcher.alive()) == 2


LifecycleMachine.TestCase.settings = settings(
    max_examples=1500 if SOAK else 80,
    stateful_step_count=60 if SOAK else 40,
    deadline=None,
    database=None,
    derandomize=not SOAK,  # a fault that it finds is found again; the longer form looks further
    suppress_health_check=list(HealthCheck),
)
TestLifecycle = LifecycleMachine.TestCase
