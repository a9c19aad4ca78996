"""What clients of several services in turn were told of jobs, and what follows from that."""

import re
from copy import copy
from datetime import datetime
from typing import Self

from attrs import define, evolve, field, fields

from jobworker.errors import JobworkerError
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.lifecycle import Reason, State
from jobworker.sandbox.protocol.end_requests import OUTPUT, STOP, TIMEOUT

from .kept_launcher import KeptLauncher
from .played_program import Program

_REASONS = {TIMEOUT: Reason.TIMEOUT, OUTPUT: Reason.OUTPUT}
_ANY = JobSpec(command=("any",))


@define(eq=False)
class Told:
    """The model: it knows no states, only what was said and what cannot be unsaid."""

    ids: dict[str, JobId] = field(factory=dict)
    """By request, of the jobs that were admitted."""
    refused: dict[str, str] = field(factory=dict)
    """By request, of those whose client was told that there is no job: the error."""
    ends: dict[JobId, JobRecord] = field(factory=dict)
    stopped: set[JobId] = field(factory=set)
    """Whose end somebody has asked for."""
    longest_grace: dict[JobId, float] = field(factory=dict)
    """The most that any who asked for an end has given the job, in seconds."""
    removing: set[JobId] = field(factory=set)
    """Which somebody has asked to be removed."""
    removed: set[JobId] = field(factory=set)
    pruned: bool = False
    """Whether somebody has asked for removals of output."""
    refused_ids: set[JobId] = field(factory=set)
    """Which a refusal has named."""
    stop_shown: set[JobId] = field(factory=set)
    """Whose records were shown with the time at which their end was asked for."""
    uncounted: dict[JobId, int] = field(factory=dict)
    """How many discarded bytes killed services may have known of alone."""
    launcher_lost_at: datetime | None = None
    """When a launcher died last."""
    was_killed_under: set[JobId] = field(factory=set)
    """The jobs that lived when a service was killed."""

    def copy(self) -> Self:
        """The same, to be told more."""
        copies = {each.name: copy(getattr(self, each.name)) for each in fields(type(self))}
        return type(self)(**copies)

    def admitted(self, request: str, record: JobRecord) -> None:
        """A client was told that its job is admitted."""
        assert record.spec.name == request
        self.take_id(request, record.id)
        self.hear(record)

    def take_id(self, request: str, job: JobId) -> None:
        """A client was told the id of its job."""
        assert job not in {*self.ids.values(), *self.refused_ids}, "each id once"
        self.ids[request] = job

    def refuse(self, request: str, error: JobworkerError) -> None:
        """A client was told that there is no job."""
        self.refused[request] = str(error)
        for number in re.findall(r"record job (\d+)", str(error)):
            assert int(number) not in self.ids.values(), "each id once"
            self.refused_ids.add(JobId(int(number)))

    def ask_to_stop(self, job: JobId, grace_seconds: float) -> None:
        """A client is about to ask for the end of a job."""
        self.stopped.add(job)
        self.longest_grace[job] = max(grace_seconds, self.longest_grace.get(job, 0.0))

    def expect_loss(self, when: datetime) -> None:
        """The launcher is about to be gone, and what it alone knows."""
        self.stop_shown &= self.ends.keys()
        self.launcher_lost_at = when

    def expect_kill(
        self, supervisor: Supervisor, launcher: KeptLauncher, output_was_full: bool
    ) -> None:
        """The service is about to be killed, and what it alone knows goes with it.

        A stop is the launcher's as soon as that has taken it, unless the job was to end for another
        cause. Of what was discarded the index has at least half, if the disk took that.
        """
        asked = {job: each.asked for job, each in launcher.programs.items() if each.asked}
        stopped = {job for job, each in asked.items() if each.cause == STOP}
        self.stop_shown &= stopped | self.ends.keys()
        for job, execution in supervisor._live.items():
            self.was_killed_under.add(job)
            discarded = execution.spool.statistics().discarded_bytes
            lost = discarded if output_was_full else discarded // 2
            self.uncounted[job] = self.uncounted.get(job, 0) + lost

    def hear(self, record: JobRecord) -> None:
        """A client was told how a job stands."""
        if record.stop_requested_at is not None:
            self.stop_shown.add(record.id)
        is_forgotten = record.stop_requested_at is None and record.id in self.stop_shown
        assert not is_forgotten, f"a stop is forgotten: {record}"
        before = self.ends.get(record.id)
        if before is not None:
            assert record.ended, f"the end of job {record.id} is lost: {record}"
            assert record.detail.startswith(before.detail), (before.detail, record.detail)
            assert _end_of(record) == _end_of(before), f"the end of job {record.id} has changed"
        elif record.ended:
            self.ends[record.id] = record

    def see_list(self, listed: dict[JobId, JobRecord], ended_before: set[JobId]) -> None:
        """A client has listed all jobs; `ended_before` had ended before it asked."""
        for record in listed.values():
            assert record.id not in self.removed, f"job {record.id} is back"
            assert record.owner, f"nobody has job {record.id}"
            if record.id in self.ids.values():
                assert record.ended or record.id not in ended_before, "an end is taken back"
                self.hear(record)
        names = [record.spec.name for record in listed.values()]
        assert len(names) == len(set(names)), "each request once"
        for job in self.ids.values():
            assert job in listed or job in self.removing, f"job {job} is lost"

    def check_cause(self, record: JobRecord, program: Program | None) -> None:
        """The end that is told is the one that the job had, for the cause that came first."""
        how = (record.state, record.reason)
        if program is None:
            never_ran = [(State.FAILED, Reason.START), (State.FAILED, Reason.LOST)]
            assert how in (*never_ran, (State.STOPPED, None))
            if record.state is State.STOPPED:
                assert record.id in self.stopped, "nobody asked for that"
            if record.reason is Reason.LOST and record.id in self.ids.values():
                lost_at = self.launcher_lost_at
                assert lost_at is not None, f"it could start: {record}"
                assert record.created_at <= lost_at, f"it could start: {record}"
            return
        if program.may_only_have_run:
            assert how in ((State.FAILED, Reason.START), (State.FAILED, Reason.LOST))
            return
        if program.lost and record.reason is Reason.LOST:
            return
        assert program.exit is not None, f"it runs: {record}"
        assert how == _verdict(program), (how, program.cause, program.exit)
        assert (record.exit_code, record.signal) == (program.exit.code, program.exit.signal)

    def check_sizes(self, record: JobRecord, program: Program | None) -> None:
        """What was written is kept, or told as discarded."""
        wrote = sum(map(len, program.wrote)) if program is not None else 0
        told = record.stdout_bytes + record.stderr_bytes + record.discarded_bytes
        assert told <= wrote
        complete = program is None or not (program.lost or program.may_only_have_run)
        least = wrote - self.uncounted.get(record.id, 0)
        assert not complete or told >= least, f"{wrote} bytes were written: {record}"
        if record.discarded_bytes and record.id not in self.was_killed_under:
            assert record.output_cut is not None, f"nobody was told why: {record}"


def _verdict(program: Program) -> tuple[State, Reason | None]:
    """How the end of a program is to be told."""
    assert program.exit is not None
    if program.cause == STOP:
        return State.STOPPED, None
    if program.cause:
        return State.FAILED, _REASONS[program.cause]
    if program.exit.want == "limit":
        return State.FAILED, Reason.OOM
    if program.exit.signal is not None:
        return State.FAILED, Reason.SIGNAL
    return (State.FAILED, Reason.EXIT) if program.exit.code else (State.COMPLETED, None)


def _end_of(record: JobRecord) -> JobRecord:
    """What of a record stays once its end was told."""
    return evolve(record, spec=_ANY, abridged=(), output_removed_at=None, detail="")
