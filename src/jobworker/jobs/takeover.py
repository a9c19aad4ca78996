"""What a service that starts makes of the jobs of an earlier one, before its first client.

    the history says    the launcher has it    so the job
    started             yes                    goes on: its pipes are read on, its end is awaited
    being started       was to, and did not    waits again, as below
    started             no                     is FAILED, lost
    waiting             no                     waits again, unless it had secrets: no disk has them
    ended               yes                    is removed there, and killed if it lives
    removed, no output  either                 stays removed, and what it left goes (`leftovers`)
    refused (its note)  either                 is none: it is killed, and what it left goes, too
    nothing             either                 is adopted (`adoption`)

Where a job's note knows more (`job_note`), which a full disk or an older copy of the history may be
the cause of, that counts: an end that was told stays as it was told, and is recorded when the disk
takes it.

A record is committed as INITIALIZING before its job is started (or while, and then its id has left
the service only after the commit), so what is PENDING has never run. "Ended" with the launcher
having it still is a service that died between the commit of the end and the removal, and may not
have had the disk's word on the output by then: the disk is asked again, as it is for each end that
is told here.

What becomes of the output, `inherited_output` says.
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
"""How many adopted records go to the history at a time: they share transactions. Each may take
five megabytes of memory until it is there."""


async def take_over(
    launcher: LauncherClient, history: History, spools: Path, now: datetime
) -> Takeover:
    """Put jobs, output and history in order after an earlier service.

    Raises InternalError where what is to be adopted cannot be recorded, or a live job's output not
    be kept: a service that cannot tell what becomes of jobs does not start, and the launcher keeps
    them.
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
    _tell(inheritance)
    return inheritance


async def _adopt(
    launcher: LauncherClient, history: History, spools: Path, jobs: Collection[JobId], now: datetime
) -> dict[JobId, JobRecord]:
    """Give each job that the history does not have a record there: those that have not ended."""
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
                    # Lost until it is known better: a start cut short must not run it again.
                    record = evolve(record, state=State.INITIALIZING)
                nursery.start_soon(history.put, record)
                records.append(without_bulk(record))
    history.pass_over(max((record.id for record in records), default=JobId(0)))
    log_adopted(records, launcher.inherited.keys())
    return {record.id: record for record in records if not record.ended}


async def _ask_notes(spools: Path, unfinished: Mapping[JobId, JobRecord]) -> dict[JobId, JobRecord]:
    """What is unfinished, each job's record as the history or its note knows it better."""
    found = dict[JobId, JobRecord]()
    for page in _batched(sorted(unfinished), RECORDS_TOGETHER):
        records = await in_thread(newer_of, spools, [unfinished[job] for job in page])
        found |= {record.id: record for record in records}
    return found


async def _take_back_starts(
    history: History, undone: Sequence[JobRecord]
) -> dict[JobId, JobRecord]:
    """Those of `undone` that were being started wait again: their programs were not executed."""
    back = [evolve(r, state=State.PENDING) for r in undone if r.state is State.INITIALIZING]
    await _record(history, back)
    return {record.id: record for record in back}


async def _record(history: History, records: Sequence[JobRecord]) -> None:
    """Have the history take these, as far as the disk does, before anybody is told of them."""
    for page in _batched(records, RECORDS_TOGETHER):
        async with trio.open_nursery() as nursery:
            for record in page:
                nursery.start_soon(_put, history, record)


async def _put(history: History, record: JobRecord) -> None:
    try:
        await history.put(record)
    except InternalError as error:  # this service knows it all the same
        log.error("%s", error)


async def _go_on(
    inheritance: Takeover,
    alive: tuple[Started, Exits] | None,
    record: JobRecord,
    spools: Path,
    since: datetime,
    now: datetime,
) -> None:
    """Add to `inheritance` what becomes of a job that has not ended in the history.

    `alive` is what the launcher has of it, and `since` when its program began then.
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
    except JobworkerError as error:  # what it writes could not be kept
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
    """Whether the launcher has a job's end already."""
    return alive is not None and alive[1].statistics().current_buffer_used > 0


def _cannot_wait_again(record: JobRecord) -> str:
    """Why a job that the launcher does not have is lost; "" where it merely waits."""
    if record.state is State.INITIALIZING:
        return "its start was cut short, by the end of the service or of its launcher"
    if record.state not in WAITING:
        return "its launcher ended while the job was alive"
    if record.spec.secret_environment or "secret_environment" in record.abridged:
        return "the service ended while the job waited, and its secret variables with it"
    return ""


def _as_running(record: JobRecord, since: datetime) -> JobRecord:
    """The record of a job whose program runs, whatever of that was committed."""
    for event in (Event.ADMIT, Event.START):
        with suppress(ValueError):
            record = evolve(record, state=advance(record.state, event))
    if record.started_at is None:
        record = evolve(record, started_at=since)
    return record


def _batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive parts of `items`, each of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _tell(inheritance: Takeover) -> None:
    if inheritance.running or inheritance.waiting:
        log.info(
            "taken over: %d jobs that run, %d that wait",
            len(inheritance.running),
            len(inheritance.waiting),
        )
