"""Takeover: a service that starts puts the jobs of an earlier service in order.

This happens before the first client connects. Each job is handled by this table:

    the history says    the launcher has it    so the job
    started             yes                    goes on: the service reads its pipes and awaits it
    being started       asked to, has not run  waits again, as below
    started             no                     is FAILED with the reason "lost"
    waiting             no                     waits again, or is lost if it had secrets
    ended               yes                    is killed if it lives, and the launcher forgets it
    removed, no output  either                 stays removed; its leftovers go (`leftovers`)
    refused (its note)  either                 is killed if it lives; its leftovers go too
    nothing             either                 is adopted (`adoption`)

If a job's note (`history.job_note`) knows more than the history, the note counts. The cause may be
a full disk or an older copy of the history. An end that clients know does not change; the history
records it when the disk takes it.

The record of a job is committed as INITIALIZING before the job is started, or while it is started;
then its id leaves the service only after the commit. So a job that is PENDING has never run. If a
job has ended by the history and the launcher still has it, the service died between the commit of
the end and the removal. Its output may not have been synced by then, so it is synced again, like
the output of every job that ends here.

`jobs.inherited_output` handles the output.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import trio
from attrs import evolve

from jobworker.errors import InternalError, JobworkerError
from jobworker.jobs.adoption import adopted, jobs_in, log_adopted, newer_of, read_notes
from jobworker.jobs.history.history import History
from jobworker.jobs.inheritance import RunningJob, Takeover, WaitingJob, have_forgotten, let_go
from jobworker.jobs.inherited_output import (
    cannot_go_on,
    end_again,
    end_as_told,
    lose,
    open_spool,
    sync,
)
from jobworker.jobs.leftovers import remove_leftovers
from jobworker.model.job import JobId, JobRecord
from jobworker.model.lifecycle import WAITING, Event, State, advance
from jobworker.model.summary import without_bulk
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.threads import in_thread

T = TypeVar("T")

log = logging.getLogger("jobworker.jobs")

RECORDS_TOGETHER = 40
"""How many records are handled at a time. Their writes share transactions. Each record may take
five megabytes of memory until it is written."""


async def take_over(
    launcher: LauncherClient, history: History, spools: Path, now: datetime
) -> Takeover:
    """Put jobs, output and history in order after an earlier service. Returns its jobs.

    `spools`: the directory of jobs' output. Raises InternalError if an adopted job cannot be
    recorded, or if the output of a live job cannot be kept. Then the service does not start, and
    the launcher keeps the jobs. Raises JobworkerError if the launcher refuses.
    """
    since = {
        job: now - timedelta(seconds=started.age_seconds)
        for job, (started, _) in launcher.inherited.items()
    }
    there = await in_thread(jobs_in, spools)
    known = await history.known([*there, *launcher.inherited])
    unfinished = {record.id: record for record in history.unfinished}
    unknown = (there | launcher.inherited.keys()) - known
    none = await remove_leftovers(
        launcher, history, spools, unknown=unknown, unfinished=unfinished.keys()
    )
    unfinished = {job: record for job, record in unfinished.items() if job not in none}
    undone = unfinished.keys() & launcher.unstarted
    unfinished |= await _adopt(launcher, history, spools, unknown - none, now)
    ended_before = launcher.inherited.keys() - unfinished.keys() - none
    unfinished = await _ask_notes(spools, unfinished)
    unfinished |= await _take_back_starts(history, [unfinished[job] for job in sorted(undone)])
    inheritance = Takeover()
    for job, record in sorted(unfinished.items()):
        await _go_on(
            inheritance, launcher.inherited.get(job), record, spools, since.get(job, now), now
        )
    again = [await end_again(spools, history, job) for job in sorted(ended_before)]
    await sync([*inheritance.ended, *again])
    inheritance.ended += [each for each in again if each.spool.sync_fault]
    await _record(history, [each.record for each in inheritance.ended])
    for each in again:
        if each.spool.sync_fault:  # the launcher forgets it when that is recorded
            let_go(*launcher.inherited[each.record.id])
        else:
            each.spool.close()
            await have_forgotten(launcher, each.record.id)
    _log_taken_over(inheritance)
    return inheritance


async def _adopt(
    launcher: LauncherClient, history: History, spools: Path, jobs: Collection[JobId], now: datetime
) -> dict[JobId, JobRecord]:
    """Record each of `jobs`, which the history does not have. Returns those that have not ended."""
    records = list[JobRecord]()
    for page in _batched(sorted(jobs), RECORDS_TOGETHER):
        notes = await in_thread(read_notes, spools, page)
        async with trio.open_nursery() as nursery:
            for job in page:
                lives, directory = job in launcher.inherited, spools / str(job)
                record = adopted(job, notes.get(job), lives=lives, directory=directory, now=now)
                if record is None:
                    history.never_give(job)
                    continue
                if not record.ended:
                    # If this start of the service is cut short, the next one must not run the job
                    # again.
                    record = evolve(record, state=State.INITIALIZING)
                nursery.start_soon(history.put, record)
                records.append(without_bulk(record))
    history.pass_over(max((record.id for record in records), default=JobId(0)))
    log_adopted(records, launcher.inherited.keys())
    return {record.id: record for record in records if not record.ended}


async def _ask_notes(spools: Path, unfinished: Mapping[JobId, JobRecord]) -> dict[JobId, JobRecord]:
    """The records of the unfinished jobs, after a look at their notes (`adoption.newer`)."""
    found = dict[JobId, JobRecord]()
    for page in _batched(sorted(unfinished), RECORDS_TOGETHER):
        records = await in_thread(newer_of, spools, [unfinished[job] for job in page])
        found |= {record.id: record for record in records}
    return found


async def _take_back_starts(
    history: History, undone: Sequence[JobRecord]
) -> dict[JobId, JobRecord]:
    """Have jobs wait again that were being started and whose program the launcher never executed.

    Returns their new records. `undone`: the jobs that the launcher was asked to start and has not.
    """
    back = [evolve(r, state=State.PENDING) for r in undone if r.state is State.INITIALIZING]
    await _record(history, back)
    return {record.id: record for record in back}


async def _record(history: History, records: Sequence[JobRecord]) -> None:
    """Record these, as far as the disk allows, before a client gets to know them."""
    for page in _batched(records, RECORDS_TOGETHER):
        async with trio.open_nursery() as nursery:
            for record in page:
                nursery.start_soon(_put, history, record)


async def _put(history: History, record: JobRecord) -> None:
    try:
        await history.put(record)
    except InternalError as error:  # this service has the record in memory
        log.error("%s", error)


async def _go_on(
    inheritance: Takeover,
    alive: tuple[Started, Exits] | None,
    record: JobRecord,
    spools: Path,
    since: datetime,
    now: datetime,
) -> None:
    """Add a job that has not ended by the history to `inheritance`.

    `alive`: the job in the launcher; None if it does not have the job. `since`: the time when the
    program began.
    """
    job = record.id
    if record.ended:
        log.warning("job %d: its end is taken from its note: %s", job, record.state.value)
        if alive is not None:
            let_go(*alive)
        inheritance.ended.append(await end_as_told(spools, record, now))
        return
    if alive is None and (problem := _cannot_wait_again(record)):
        inheritance.ended.append(await lose(spools, record, now, problem))
        return
    try:
        spool, going_on = await open_spool(
            spools / str(job), record, now, lives=alive is not None, ended=_has_ended(alive)
        )
    except JobworkerError as error:  # the output of the job could not be kept
        if alive is not None:
            raise cannot_go_on(job, error) from error
        log.error("job %d: %s", job, error)
        inheritance.ended.append(await lose(spools, record, now, str(error)))
        return
    if alive is None:
        inheritance.waiting.append(WaitingJob(going_on, spool))
    else:
        inheritance.running.append(RunningJob(_as_running(going_on, since), spool, *alive))


def _has_ended(alive: tuple[Started, Exits] | None) -> bool:
    """Whether the launcher has reported the job's exit already."""
    return alive is not None and alive[1].statistics().current_buffer_used > 0


def _cannot_wait_again(record: JobRecord) -> str:
    """Why a job that the launcher does not have is lost; "" if it can wait again."""
    if record.state is State.INITIALIZING:
        return "its start was cut short, by the end of the service or of its launcher"
    if record.state not in WAITING:
        return "its launcher ended while the job was alive"
    if record.spec.secret_environment or "secret_environment" in record.abridged:
        return "the service ended while the job waited, and its secret variables with it"
    return ""


def _as_running(record: JobRecord, since: datetime) -> JobRecord:
    """The record of a job whose program runs, also if the history has not recorded that."""
    for event in (Event.ADMIT, Event.START):
        with suppress(ValueError):
            record = evolve(record, state=advance(record.state, event))
    if record.started_at is None:
        record = evolve(record, started_at=since)
    return record


def _batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield consecutive parts of `items`, each with at most `size` of them."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _log_taken_over(inheritance: Takeover) -> None:
    if inheritance.running or inheritance.waiting:
        log.info(
            "taken over: %d jobs that run, %d that wait",
            len(inheritance.running),
            len(inheritance.waiting),
        )
