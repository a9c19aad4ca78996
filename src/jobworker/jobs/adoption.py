"""Adoption: new records for jobs that the history does not know, or of which it knows too little.

The history may be missing, or an administrator may have put an older copy back, or a service may
have died before it committed a job's first record. In each case output and live jobs are still
there, and none of it is removed. The note beside the output (`history.job_note`) says what the job
was. Without a note it is known only that there was a job. The service makes a record for the job,
so that its owner, if the note names one, and clients with access to all jobs find it again:

    the launcher has it    the note says    so the record
    yes                    ended            is the note's, and the launcher forgets the job
    yes                    anything else    says that the job runs; without a note: no time limit
    no                     ended            is the note's
    no                     anything else    is FAILED with the reason "lost": its end is unknown

If the history says that a job is PENDING and its note says that it has started, the note counts:
the job must not run twice.
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from attrs import evolve

from jobworker.jobs.history.job_note import read_news, read_note
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.lifecycle import WAITING
from jobworker.sandbox.protocol.requests import MAX_JOB

log = logging.getLogger("jobworker.jobs")

UNKNOWN_SPEC = JobSpec(command=("unknown",), timeout_seconds=0)
ADOPTED = "the history did not have this job: its record was made anew"


def jobs_in(spools: Path) -> frozenset[JobId]:
    """The ids that name anything in the spool directory. Blocks. Raises OSError."""
    return frozenset(filter(None, (_job_of(entry.name) for entry in spools.iterdir())))


def _job_of(name: str) -> JobId | None:
    plain = name.isascii() and name.isdecimal() and not name.startswith("0")
    return JobId(int(name)) if plain and len(name) < 17 and int(name) <= MAX_JOB else None


def read_notes(spools: Path, jobs: Iterable[JobId]) -> dict[JobId, JobRecord]:
    """The records by the notes of these jobs, for the jobs that have a note. Blocks."""
    found = {job: read_note(spools, job) for job in jobs}
    return {job: note for job, note in found.items() if note is not None}


def newer_of(spools: Path, records: Iterable[JobRecord]) -> list[JobRecord]:
    """For each of these records of the history, see `newer`. Reads the notes. Blocks."""
    return [newer(record, read_news(spools, record)) for record in records]


def newer(record: JobRecord, note: JobRecord | None) -> JobRecord:
    """The record with the most that is known of a job, by the history's record and its note."""
    if note is None or record.ended:
        return record
    if note.ended or (record.state in WAITING and note.state not in WAITING):
        return note
    return evolve(
        record,
        stop_requested_at=record.stop_requested_at or note.stop_requested_at,
        output_cut=record.output_cut or note.output_cut,
        discarded_bytes=max(record.discarded_bytes, note.discarded_bytes),
        detail=max(record.detail, note.detail, key=len),
    )


def adopted(
    job: JobId, note: JobRecord | None, *, lives: bool, directory: Path, now: datetime
) -> JobRecord | None:
    """The new record of a job that the history does not have; None if there was no such job.

    `lives`: whether the launcher has the job. `directory`: that of its output, which the function
    looks into if there is neither a note nor a live job. `now`: the time of a record without a
    note.
    """
    if note is not None:
        return note if note.ended else evolve(note, detail=ADOPTED)
    if not lives and not _has_index(directory):
        return None
    return JobRecord(id=job, spec=UNKNOWN_SPEC, owner="", created_at=now, detail=ADOPTED)


def _has_index(directory: Path) -> bool:
    """Whether `directory` has a job's output. If not, the log says so."""
    try:
        if (directory / "index").is_file():
            return True
        why = "is no job's output"
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
    log.warning("%s %s; it stays, and no job gets that id", directory, why)
    return False


def log_adopted(records: Sequence[JobRecord], lives: Collection[JobId]) -> None:
    """Log which jobs were adopted. `lives`: the jobs that the launcher has."""
    if not records:
        return
    ids = [record.id for record in records]
    run = sum(record.id in lives and not record.ended for record in records)
    shown = ", ".join(map(str, ids[:10])) + (f" to {ids[-1]}" if len(ids) > 10 else "")
    log.warning(
        "the history did not have %d jobs, which are adopted: %d run, %d have ended (%s)",
        *(len(ids), run, len(ids) - run, shown),
    )
