"""What a service that starts makes of the jobs of an earlier one, before its first client.

    the history says    the launcher has it    so the job
    started             yes                    goes on: its pipes are read on, its end is awaited
    started             no                     is FAILED, lost
    waiting             no                     waits again, unless it had secrets: no disk has them
    ended, or nothing   yes                    is removed, and killed if it lives

A record is committed as INITIALIZING before its job is started (or while, and then its id has left
the service only after the commit), so what is PENDING has never run. "Ended" with the launcher
having it still is a service that died between the commit of the end and the removal; "nothing"
is one that died before the commit of the beginning, and nobody was told of that job.

Output goes on exactly where it ends: what a service has moved is in the files, and what it has not
is in the pipes, which the launcher kept.
"""

import logging
import shutil
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import trio
from attrs import Factory, define, evolve

from jobworker.errors import JobworkerError, NotFound
from jobworker.jobs.history import History
from jobworker.jobs.spool import Spool
from jobworker.model.job import JobId, JobRecord
from jobworker.model.lifecycle import WAITING, Event, Reason, advance
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.link import Exits, Link, Started

log = logging.getLogger("jobworker.jobs")


@define(eq=False)
class Running:
    """A job that goes on."""

    record: JobRecord
    spool: Spool
    started: Started
    exits: Exits


@define(eq=False)
class Waiting:
    """A job that waits again."""

    record: JobRecord
    spool: Spool


@define(eq=False)
class Inheritance:
    """What was taken over, in the order of ids."""

    running: list[Running] = Factory(list)
    waiting: list[Waiting] = Factory(list)

    @property
    def ids(self) -> frozenset[JobId]:
        """The jobs that were taken over."""
        both: list[Running | Waiting] = [*self.running, *self.waiting]
        return frozenset(each.record.id for each in both)


async def take_over(link: Link, history: History, spools: Path, now: datetime) -> Inheritance:
    """Put jobs, output and history in order after an earlier service.

    Raises InternalError where the history cannot be written: a service that cannot tell what became
    of jobs does not start.
    """
    unrecorded = await trio.to_thread.run_sync(_remove_unrecorded, spools, history.next_id)
    history.pass_over(JobId(max([*unrecorded, *link.inherited], default=0)))
    unfinished = {record.id: record for record in history.unfinished}
    for job in link.inherited.keys() - unfinished.keys():
        await _remove(link, job)
    inheritance = Inheritance()
    for job, record in sorted(unfinished.items()):
        alive = link.inherited.get(job)
        if alive is None and (problem := _cannot_wait_again(record)):
            await _lose(history, spools, record, now, problem)
            continue
        try:
            spool, removed_at = await _open_spool(spools / str(job), _has_ended(alive), now)
        except JobworkerError as error:  # what it writes could not be kept
            log.error("job %d: %s", job, error)
            if alive is not None:
                await _remove(link, job)
            await _lose(history, spools, record, now, str(error))
            continue
        if alive is None:
            inheritance.waiting.append(Waiting(record, spool))
        else:
            running = _as_running(record, alive[0], now)
            running = evolve(running, output_removed_at=removed_at or record.output_removed_at)
            inheritance.running.append(Running(running, spool, *alive))
    _tell(inheritance)
    return inheritance


def _has_ended(alive: tuple[Started, Exits] | None) -> bool:
    """Whether the launcher has a job's end already."""
    return alive is not None and alive[1].statistics().current_buffer_used > 0


async def _open_spool(directory: Path, ended: bool, now: datetime) -> tuple[Spool, datetime | None]:
    """Open a job's output, or make it anew where it was removed; then also say when that was.

    Of one that has `ended` the output may have had to go for the disk to take the record of that,
    and the service may have been killed between the two. Raises OutputError, Busy, and NotFound
    for a job that has not ended.
    """
    try:
        return await trio.to_thread.run_sync(Spool.open, directory), None
    except NotFound:
        if not ended:
            raise
    log.warning("job %s: its output was removed before its end was recorded", directory.name)
    await trio.to_thread.run_sync(partial(shutil.rmtree, directory, ignore_errors=True))
    return await trio.to_thread.run_sync(Spool.create, directory), now


def _cannot_wait_again(record: JobRecord) -> str:
    """Why a job that the launcher does not have is lost; "" where it merely waits."""
    if record.state not in WAITING:
        return "the service ended while the job was alive"
    if record.spec.secret_environment:
        return "the service ended while the job waited, and its secret variables with it"
    return ""


def _remove_unrecorded(spools: Path, next_id: JobId) -> list[int]:
    """Remove the output of jobs that were never recorded: their ids."""
    found = [int(entry.name) for entry in spools.iterdir() if entry.name.isdigit()]
    unrecorded = [job for job in found if job >= next_id]
    for job in unrecorded:
        shutil.rmtree(spools / str(job))
    return unrecorded


async def _remove(link: Link, job: JobId) -> None:
    started, exits = link.inherited[job]
    close_all([started.stdout, started.stderr])
    exits.close()
    await link.remove(job)


async def _lose(
    history: History,
    spools: Path,
    record: JobRecord,
    now: datetime,
    detail: str,
) -> None:
    """Seal the output of a job that nobody has any more, and record its end."""
    record = evolve(
        record,
        state=advance(record.state, Event.FAIL),
        reason=Reason.LOST,
        detail=detail,
        ended_at=now,
    )
    try:
        spool = await trio.to_thread.run_sync(Spool.open, spools / str(record.id))
    except JobworkerError as error:
        log.warning("job %d: its output is lost: %s", record.id, error)
    else:
        try:
            await spool.seal()
            sizes = spool.statistics()
            record = evolve(
                record,
                stdout_bytes=sizes.stdout_bytes,
                stderr_bytes=sizes.stderr_bytes,
                discarded_bytes=sizes.discarded_bytes,
            )
        finally:
            spool.close()
    await history.put(record)
    log.info("job %d: FAILED (lost)", record.id)


def _as_running(record: JobRecord, started: Started, now: datetime) -> JobRecord:
    """The record of a job whose program runs, whatever of that was committed."""
    for event in (Event.ADMIT, Event.START):
        with suppress(ValueError):
            record = evolve(record, state=advance(record.state, event))
    if record.started_at is None:
        record = evolve(record, started_at=now - timedelta(seconds=started.age_seconds))
    return record


def _tell(inheritance: Inheritance) -> None:
    if inheritance.running or inheritance.waiting:
        log.info(
            "taken over: %d jobs that run, %d that wait",
            len(inheritance.running),
            len(inheritance.waiting),
        )
