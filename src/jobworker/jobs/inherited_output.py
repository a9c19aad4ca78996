"""The output that an earlier service has left of a job: opened to go on, sealed, or opened to read.

The output of a live job goes on exactly where it stopped: the files have the bytes that the earlier
service has moved, and the pipes, which the launcher has kept, have the others. If the files of a
live job are gone or unreadable, its output goes on in new files, and the old ones are set aside.
"""

import errno
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from attrs import evolve

from jobworker.errors import (
    Busy,
    InternalError,
    JobworkerError,
    NotFound,
    OutOfDescriptors,
    OutputError,
)
from jobworker.jobs.history.history import History
from jobworker.jobs.history.job_note import make_note
from jobworker.jobs.inheritance import EndedJob
from jobworker.jobs.output.directory import was_removed
from jobworker.jobs.output.sizes import with_sizes
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.output.sync import NOT_SYNCED
from jobworker.model.job import JobId, JobRecord
from jobworker.model.lifecycle import Event, Reason, advance
from jobworker.threads import in_thread

log = logging.getLogger("jobworker.jobs")

_OF_THE_HOST = frozenset(
    {errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN, errno.ENOLCK}
)
"""Errors that say nothing about the files: the host lacks something, or its disk fails."""


async def open_spool(
    directory: Path, record: JobRecord, now: datetime, *, lives: bool, ended: bool
) -> tuple[Spool, JobRecord]:
    """Open a job's output, or make new files. Returns the spool, and the record that tells of it.

    `lives`: whether the launcher has the job. `ended`: whether it has the job's exit too. If the
    job has ended, its output may have been removed so that the disk could take the record of the
    end, and the service may have been killed between the two. If it has not ended, its output may
    still be sealed, by a service that was killed before it had recorded an end. Raises OutputError
    if new files cannot be made. Raises InternalError if the host lacks something: then the output
    may be whole, and is not set aside.
    """
    try:
        spool = await in_thread(partial(Spool.open, directory, goes_on=not ended))
        return spool, _with_losses(record, spool, now)
    except JobworkerError as error:
        if _is_of_the_host(error):
            raise cannot_go_on(record.id, error) from error
        missing, why = isinstance(error, NotFound), error.message
    if ended and missing and await in_thread(was_removed, directory):
        log.warning("job %s: its output was removed before its end was recorded", directory.name)
        return Spool.gone(), evolve(record, output_removed_at=now)
    kept = await in_thread(_set_aside, directory)
    spool = await in_thread(Spool.create, directory)
    with suppress(OutputError):  # the job goes on without a note
        await in_thread(make_note, directory.parent, record)
    where = f"; it is set aside as {kept}" if kept else ""
    log.warning("job %s: its output so far is missing: %s%s", directory.name, why, where)
    if not lives:  # the job has not started, so it has written nothing
        return spool, record
    return spool, record.noted(f"output from before {now:%F %T} UTC is missing")


def _with_losses(record: JobRecord, spool: Spool, now: datetime) -> JobRecord:
    """The record, with a note if the job's files have become shorter since they were written."""
    if not spool.lost_bytes:
        return record
    note = f"{spool.lost_bytes} bytes of output from before {now:%F %T} UTC are missing"
    log.warning("job %d: %s: its files have become shorter", record.id, note)
    return record.noted(note)


def _set_aside(directory: Path) -> Path | None:
    """Move a job's output away. Returns where to, or None if there is nothing at `directory`."""
    aside = directory.parent.parent / "set-aside"
    kept = aside / f"{directory.name}-{time.time_ns()}"
    try:
        aside.mkdir(mode=0o700, exist_ok=True)
        directory.rename(kept)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(
            f"cannot set aside {directory}: {error.strerror}",
            remedy=f"check the owner and the disk of {aside}",
        ) from error
    return kept


def _is_of_the_host(error: JobworkerError) -> bool:
    """Whether output could not be opened for a reason that is not in its files."""
    if isinstance(error, (OutOfDescriptors, Busy)):
        return True
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _OF_THE_HOST


def cannot_go_on(job: JobId, error: JobworkerError) -> InternalError:
    """The error for a live job whose output cannot be kept: the service does not start."""
    return InternalError(
        f"cannot go on with job {job}: {error.message}; nothing of it was changed",
        remedy=error.remedy or "see to the disk and the limits of the service, and start it again",
    )


async def _open_ended(spools: Path, record: JobRecord) -> Spool:
    """Open the output of a job that the launcher does not have; to read if the record has its end.

    Without output it is an empty spool. Raises InternalError if the host lacks something.
    """
    directory = spools / str(record.id)
    open_it = partial(Spool.open_ended, written={}) if record.ended else Spool.open
    try:
        return await in_thread(open_it, directory)
    except JobworkerError as error:
        if _is_of_the_host(error):
            raise cannot_go_on(record.id, error) from error
        if record.output_removed_at is None:
            log.warning("job %d: its output is lost: %s", record.id, error)
        return Spool.gone()


async def end_as_told(spools: Path, record: JobRecord, now: datetime) -> EndedJob:
    """The end of a job by `record`, which comes from its note. Its output may be removed."""
    if await in_thread(was_removed, spools / str(record.id)):
        record = evolve(record, output_removed_at=record.output_removed_at or now)
    return EndedJob(record, await _open_ended(spools, record))


async def end_again(spools: Path, history: History, job: JobId) -> EndedJob:
    """A job whose end the history has, with its output as far as that is there."""
    record = await history.summary(job)
    assert record is not None
    try:
        open_it = partial(Spool.open_ended, spools / str(job), written={})
        return EndedJob(record, await in_thread(open_it))
    except NotFound:
        return EndedJob(record, Spool.gone())
    except JobworkerError as error:
        return EndedJob(record, Spool.gone(sync_fault=f"{NOT_SYNCED}: {error.message}"))


async def sync(ended: Sequence[EndedJob]) -> None:
    """Sync the output of ended jobs to the disk. If that fails for a job, its record says so.

    All are synced together, so the start of the service waits no longer than the end of one job.
    """
    async with AsyncExitStack() as under_way:
        for each in ended:
            synced = each.spool.synced(each.record.id, each.record.owner)
            await under_way.enter_async_context(synced)
    for each in ended:
        if each.spool.sync_fault:
            log.error("job %d: %s", each.record.id, each.spool.sync_fault)
            each.record = each.record.noted(each.spool.sync_fault)


async def lose(spools: Path, record: JobRecord, now: datetime, detail: str) -> EndedJob:
    """Seal the output of a job that the launcher does not have. Returns its end, not yet recorded.

    `detail`: why the job is lost, for its record.
    """
    spool = await _open_ended(spools, record)
    spool.restore_discarded(record.discarded_bytes)
    record = _with_losses(record, spool, now)
    state = advance(record.state, Event.FAIL)
    record = evolve(record.noted(detail), state=state, reason=Reason.LOST)
    ended_at = now
    if spool.sealed and spool.last_ns:
        ended_at = datetime.fromtimestamp(spool.last_ns / 1e9, UTC)
    # The time of day may have been set back since the job began.
    record = evolve(record, ended_at=max(ended_at, record.started_at or record.created_at))
    try:
        await spool.seal()
    except OutputError as error:
        log.warning("job %d: %s", record.id, error)
    return EndedJob(with_sizes(record, spool.statistics()), spool)
