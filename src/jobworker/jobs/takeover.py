"""What a service that starts makes of the jobs of an earlier one, before its first client.

    the history says    the launcher has it    so the job
    started             yes                    goes on: its pipes are read on, its end is awaited
    being started       was to, and did not    waits again, as below
    started             no                     is FAILED, lost
    waiting             no                     waits again, unless it had secrets: no disk has them
    ended               yes                    is removed there, and killed if it lives
    removed, no output  either                 stays removed, and what it left goes
    nothing             either                 is adopted (`adoption`)

Where a job's note knows more (`job_note`), which a full disk or an older copy of the history may be
the cause of, that counts: an end that was told stays as it was told, and is recorded when the disk
takes it.

A record is committed as INITIALIZING before its job is started (or while, and then its id has left
the service only after the commit), so what is PENDING has never run. "Ended" with the launcher
having it still is a service that died between the commit of the end and the removal, and may not
have had the disk's word on the output by then: the disk is asked again, as it is for each end that
is told here.

Output goes on exactly where it ends: what a service has moved is in the files, and what it has not
is in the pipes, which the launcher kept. A live job whose files are gone or unreadable goes on with
new ones; what stood in their place is set aside.
"""

import errno
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio
from attrs import Factory, define, evolve

from jobworker.errors import (
    Busy,
    InternalError,
    JobworkerError,
    NotFound,
    OutOfDescriptors,
    OutputError,
)
from jobworker.jobs.adoption import adopted, jobs_in, later_of, read_notes, tell_adopted
from jobworker.jobs.history.history import History
from jobworker.jobs.history.job_note import make_note
from jobworker.jobs.output.directory import clear_mark, was_removed
from jobworker.jobs.output.ended import remove_output
from jobworker.jobs.output.spool import Spool, with_sizes
from jobworker.jobs.output.sync import NOT_SYNCED
from jobworker.model.job import JobId, JobRecord
from jobworker.model.lifecycle import WAITING, Event, Reason, State, advance
from jobworker.model.summary import without_bulk
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.service.link import Link
from jobworker.threads import in_thread

T = TypeVar("T")

log = logging.getLogger("jobworker.jobs")

_OF_THE_HOST = frozenset(
    {errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN, errno.ENOLCK}
)
RECORDS_TOGETHER = 40
"""How many adopted records go to the history at a time: they share transactions. Each may take
five megabytes of memory until it is there."""


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
class Ended:
    """A job that has ended, and whose end the history may have refused."""

    record: JobRecord
    spool: Spool


@define(eq=False)
class Inheritance:
    """What was taken over, in the order of ids."""

    running: list[Running] = Factory(list)
    waiting: list[Waiting] = Factory(list)
    ended: list[Ended] = Factory(list)

    @property
    def ids(self) -> frozenset[JobId]:
        """The jobs that were taken over."""
        every: list[Running | Waiting | Ended] = [*self.running, *self.waiting, *self.ended]
        return frozenset(each.record.id for each in every)


async def take_over(link: Link, history: History, spools: Path, now: datetime) -> Inheritance:
    """Put jobs, output and history in order after an earlier service.

    Raises InternalError where what is to be adopted cannot be recorded, or a live job's output not
    be kept: a service that cannot tell what becomes of jobs does not start, and the launcher keeps
    them.
    """
    since = {
        job: now - timedelta(seconds=started.age_seconds)
        for job, (started, _) in link.inherited.items()
    }
    there = await in_thread(jobs_in, spools)
    known = await history.known([*there, *link.inherited])
    unfinished = {record.id: record for record in history.unfinished}
    undone = unfinished.keys() & link.unstarted
    unknown = (there | link.inherited.keys()) - known
    removed = await history.removed_without_output(unknown)
    for job in removed & link.inherited.keys():
        await _remove(link, job)
    await in_thread(partial(_finish_removals, spools, removed))
    unfinished |= await _adopt(link, history, spools, unknown - removed, now)
    ended_before = link.inherited.keys() - unfinished.keys() - removed
    unfinished = await _ask_notes(spools, unfinished)
    unfinished |= await _take_back_starts(history, [unfinished[job] for job in sorted(undone)])
    inheritance = Inheritance()
    for job, record in sorted(unfinished.items()):
        alive = link.inherited.get(job)
        if record.ended:
            log.warning("job %d: its end is taken from its note: %s", job, record.state.value)
            if alive is not None:
                _let_go(*alive)
            inheritance.ended.append(await _end_as_told(spools, record, now))
            continue
        if alive is None and (problem := _cannot_wait_again(record)):
            inheritance.ended.append(await _lose(spools, record, now, problem))
            continue
        try:
            spool, going_on = await _open_spool(
                spools / str(job), record, now, lives=alive is not None, ended=_has_ended(alive)
            )
        except JobworkerError as error:  # what it writes could not be kept
            if alive is not None:
                raise _cannot_go_on(job, error) from error
            log.error("job %d: %s", job, error)
            inheritance.ended.append(await _lose(spools, record, now, str(error)))
            continue
        if alive is None:
            inheritance.waiting.append(Waiting(going_on, spool))
        else:
            going_on = _as_running(going_on, since[job])
            inheritance.running.append(Running(going_on, spool, *alive))
    again = [await _end_again(spools, history, job) for job in sorted(ended_before)]
    await _sync([*inheritance.ended, *again])
    inheritance.ended += [each for each in again if each.spool.sync_fault]
    await _record(history, [each.record for each in inheritance.ended])
    for each in again:
        if each.spool.sync_fault:  # the launcher forgets it when that is recorded
            _let_go(*link.inherited[each.record.id])
        else:
            each.spool.close()
            await _remove(link, each.record.id)
    _tell(inheritance)
    return inheritance


async def _adopt(
    link: Link, history: History, spools: Path, jobs: Collection[JobId], now: datetime
) -> dict[JobId, JobRecord]:
    """Give each job that the history does not have a record there: those that have not ended."""
    records = list[JobRecord]()
    for page in _batched(sorted(jobs), RECORDS_TOGETHER):
        notes = await in_thread(read_notes, spools, page)
        async with trio.open_nursery() as nursery:
            for job in page:
                lives, directory = job in link.inherited, spools / str(job)
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
    tell_adopted(records, link.inherited.keys())
    return {record.id: record for record in records if not record.ended}


def _finish_removals(spools: Path, jobs: Iterable[JobId]) -> None:
    """Remove the output of jobs that were removed while it was missing."""
    for job in sorted(jobs):
        try:
            remove_output(spools / str(job), force=True, ended=True)
            clear_mark(spools / str(job))
        except JobworkerError as error:
            log.warning("job %d was removed, and what is in %s stays: %s", job, spools, error)
        else:
            log.warning("job %d was removed while its output was missing: that goes now", job)


async def _ask_notes(spools: Path, unfinished: Mapping[JobId, JobRecord]) -> dict[JobId, JobRecord]:
    """What is unfinished, each job's record as the history or its note knows it better."""
    found = dict[JobId, JobRecord]()
    for page in _batched(sorted(unfinished), RECORDS_TOGETHER):
        records = await in_thread(later_of, spools, [unfinished[job] for job in page])
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


def _has_ended(alive: tuple[Started, Exits] | None) -> bool:
    """Whether the launcher has a job's end already."""
    return alive is not None and alive[1].statistics().current_buffer_used > 0


async def _open_spool(
    directory: Path, record: JobRecord, now: datetime, *, lives: bool, ended: bool
) -> tuple[Spool, JobRecord]:
    """Open a job's output, or make it anew, which its record then says.

    Of one that has `ended` the output may have had to go for the disk to take the record of that,
    and the service may have been killed between the two. Raises OutputError, and InternalError
    where it is the host that lacks something: output that may be whole is not set aside.
    """
    try:
        spool = await in_thread(Spool.open, directory)
        return spool, _with_losses(record, spool, now)
    except JobworkerError as error:
        if _is_of_the_host(error):
            raise _cannot_go_on(record.id, error) from error
        missing, why = isinstance(error, NotFound), error.message
    if ended and missing and await in_thread(was_removed, directory):
        log.warning("job %s: its output was removed before its end was recorded", directory.name)
        return Spool.gone(), evolve(record, output_removed_at=now)
    kept = await in_thread(_set_aside, directory)
    spool = await in_thread(Spool.create, directory)
    with suppress(OutputError):  # it goes on without one
        await in_thread(make_note, directory.parent, record)
    where = f"; it is set aside as {kept}" if kept else ""
    log.warning("job %s: its output so far is missing: %s%s", directory.name, why, where)
    if not lives:  # it has written nothing yet
        return spool, record
    return spool, record.noted(f"output from before {now:%F %T} UTC is missing")


def _with_losses(record: JobRecord, spool: Spool, now: datetime) -> JobRecord:
    """The record of a job that goes on, with a word about output that is gone since it was kept."""
    if not spool.lost_bytes:
        return record
    note = f"{spool.lost_bytes} bytes of output from before {now:%F %T} UTC are missing"
    log.warning("job %d: %s: its files have become shorter", record.id, note)
    return record.noted(note)


def _set_aside(directory: Path) -> Path | None:
    """Move away what stands where a job's output belongs: where to, if anything stood there."""
    aside = directory.parent.parent / "set-aside"
    kept = aside / f"{directory.name}-{time.time_ns()}"
    try:
        aside.mkdir(mode=0o700, exist_ok=True)
        directory.rename(kept)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"cannot set aside {directory}: {error.strerror}") from error
    return kept


def _cannot_wait_again(record: JobRecord) -> str:
    """Why a job that the launcher does not have is lost; "" where it merely waits."""
    if record.state is State.INITIALIZING:
        return "its start was cut short, by the end of the service or of its launcher"
    if record.state not in WAITING:
        return "its launcher ended while the job was alive"
    if record.spec.secret_environment or "secret_environment" in record.abridged:
        return "the service ended while the job waited, and its secret variables with it"
    return ""


async def _remove(link: Link, job: JobId) -> None:
    _let_go(*link.inherited[job])
    await link.begin_to_remove(job)  # a start waits for its place, where it needs that


def _let_go(started: Started, exits: Exits) -> None:
    close_all([started.stdout, started.stderr])
    exits.close()


def _is_of_the_host(error: JobworkerError) -> bool:
    """Whether opening output failed for a reason that has nothing to do with what stands there."""
    if isinstance(error, (OutOfDescriptors, Busy)):
        return True
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _OF_THE_HOST


def _cannot_go_on(job: JobId, error: JobworkerError) -> InternalError:
    return InternalError(
        f"cannot go on with job {job}: {error.message}; nothing of it was changed",
        remedy=error.remedy or "see to the disk and the limits of the service, and start it again",
    )


async def _open_ended(spools: Path, record: JobRecord) -> Spool:
    """The output of a job that the launcher does not have: to read, if its end is known."""
    directory = spools / str(record.id)
    open_it = partial(Spool.open_ended, written={}) if record.ended else Spool.open
    try:
        return await in_thread(open_it, directory)
    except JobworkerError as error:
        if _is_of_the_host(error):
            raise _cannot_go_on(record.id, error) from error
        if record.output_removed_at is None:
            log.warning("job %d: its output is lost: %s", record.id, error)
        return Spool.gone()


async def _end_as_told(spools: Path, record: JobRecord, now: datetime) -> Ended:
    """The end of a job as its note tells it: its output may have had to go meanwhile."""
    if await in_thread(was_removed, spools / str(record.id)):
        record = evolve(record, output_removed_at=record.output_removed_at or now)
    return Ended(record, await _open_ended(spools, record))


async def _end_again(spools: Path, history: History, job: JobId) -> Ended:
    """A job whose end is recorded, with its output as far as that is there."""
    record = await history.summary(job)
    assert record is not None
    try:
        open_it = partial(Spool.open_ended, spools / str(job), written={})
        return Ended(record, await in_thread(open_it))
    except NotFound:
        return Ended(record, Spool.gone())
    except JobworkerError as error:
        return Ended(record, Spool.gone(sync_fault=f"{NOT_SYNCED}: {error.message}"))


async def _sync(ended: Sequence[Ended]) -> None:
    """Have the disk take the output of ended jobs; where it refuses, the record says so.

    That of all at a time: the start of the service waits no longer than the end of one job does.
    """
    async with AsyncExitStack() as under_way:
        for each in ended:
            synced = each.spool.synced(each.record.id, each.record.owner)
            await under_way.enter_async_context(synced)
    for each in ended:
        if each.spool.sync_fault:
            log.error("job %d: %s", each.record.id, each.spool.sync_fault)
            each.record = each.record.noted(each.spool.sync_fault)


async def _lose(spools: Path, record: JobRecord, now: datetime, detail: str) -> Ended:
    """Seal the output of a job that nobody has any more: its end, which is to be recorded."""
    spool = await _open_ended(spools, record)
    spool.restore_discarded(record.discarded_bytes)
    record = _with_losses(record, spool, now)
    state = advance(record.state, Event.FAIL)
    record = evolve(record.noted(detail), state=state, reason=Reason.LOST)
    ended_at = now
    if spool.sealed and spool.last_ns:
        ended_at = datetime.fromtimestamp(spool.last_ns / 1e9, UTC)
    # The time of day may have been set back since.
    record = evolve(record, ended_at=max(ended_at, record.started_at or record.created_at))
    try:
        await spool.seal()
    except OutputError as error:
        log.warning("job %d: %s", record.id, error)
    return Ended(with_sizes(record, spool), spool)


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


def _tell(inheritance: Inheritance) -> None:
    if inheritance.running or inheritance.waiting:
        log.info(
            "taken over: %d jobs that run, %d that wait",
            len(inheritance.running),
            len(inheritance.waiting),
        )
