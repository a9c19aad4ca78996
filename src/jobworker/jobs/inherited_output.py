"""A job's output as an earlier service has left it: to go on with, to seal, or to read.

Output goes on exactly where it ends: what a service has moved is in the files, and what it has not
is in the pipes, which the launcher kept. A live job whose files are gone or unreadable goes on with
new ones; what stood in their place is set aside.
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
from jobworker.jobs.output.spool import Spool, with_sizes
from jobworker.jobs.output.sync import NOT_SYNCED
from jobworker.model.job import JobId, JobRecord
from jobworker.model.lifecycle import Event, Reason, advance
from jobworker.threads import in_thread

log = logging.getLogger("jobworker.jobs")

_OF_THE_HOST = frozenset(
    {errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN, errno.ENOLCK}
)


async def open_spool(
    directory: Path, record: JobRecord, now: datetime, *, lives: bool, ended: bool
) -> tuple[Spool, JobRecord]:
    """Open a job's output, or make it anew, which its record then says.

    Of one that has `ended` the output may have had to go for the disk to take the record of that,
    and the service may have been killed between the two. That of one that has not may be sealed: by
    a service that was killed before it had recorded an end, such as a stop's. Raises OutputError,
    and InternalError where it is the host that lacks something: output that may be whole is not set
    aside.
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


def _is_of_the_host(error: JobworkerError) -> bool:
    """Whether opening output failed for a reason that has nothing to do with what stands there."""
    if isinstance(error, (OutOfDescriptors, Busy)):
        return True
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _OF_THE_HOST


def cannot_go_on(job: JobId, error: JobworkerError) -> InternalError:
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
            raise cannot_go_on(record.id, error) from error
        if record.output_removed_at is None:
            log.warning("job %d: its output is lost: %s", record.id, error)
        return Spool.gone()


async def end_as_told(spools: Path, record: JobRecord, now: datetime) -> EndedJob:
    """The end of a job as its note tells it: its output may have had to go meanwhile."""
    if await in_thread(was_removed, spools / str(record.id)):
        record = evolve(record, output_removed_at=record.output_removed_at or now)
    return EndedJob(record, await _open_ended(spools, record))


async def end_again(spools: Path, history: History, job: JobId) -> EndedJob:
    """A job whose end is recorded, with its output as far as that is there."""
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


async def lose(spools: Path, record: JobRecord, now: datetime, detail: str) -> EndedJob:
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
    return EndedJob(with_sizes(record, spool), spool)
