"""What is written to the history of records, and read: each by one connection.

Each function runs in a thread: in the writer's those that write, in a reader's the others.
"""

import logging
import sys
from collections.abc import Collection
from datetime import datetime
from pathlib import Path

import apsw

from jobworker.jobs.history.job_note import write_note
from jobworker.jobs.history.search import NAME
from jobworker.jobs.history.spec_json import spec_pieces
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.lifecycle import LIVE, TERMINAL
from jobworker.model.summary import MAX_KEPT, summarize, whole, with_labels, without_bulk
from jobworker.serialization.convert import structure, unstructure
from jobworker.serialization.json_text import dumps, loads

log = logging.getLogger("jobworker.jobs")

MAX_READ_BYTES = 2 * MAX_KEPT
"""Of the JSON of a request that is read when the history is opened: a larger one is read when its
job starts, or when somebody asks for it."""
MANY_UNFINISHED = 100


def put(record: JobRecord, spools: Path | None, connection: apsw.Connection) -> None:
    """Write a record, new or changed; `spools` is where its note stands too."""
    if spools is not None:
        write_note(spools, record)
    summary = summarize(record)
    text = dumps(unstructure(summary))
    connection.execute(
        "UPDATE jobs SET state = ?, record = ? WHERE id = ?", (record.state.value, text, record.id)
    )
    if connection.changes():
        return
    connection.execute(
        "INSERT INTO jobs (id, state, owner, created_at, record) VALUES (?, ?, ?, ?, ?)",
        (record.id, record.state.value, record.owner, record.created_at.isoformat(), text),
    )
    # What was asked for does not change, so it is written once.
    connection.executemany(
        "INSERT OR IGNORE INTO labels (name, value, job) VALUES (?, ?, ?)", _labels_of(record)
    )
    if summary.abridged and not record.abridged:
        connection.execute(
            "INSERT OR REPLACE INTO specs (job, spec) VALUES (?, ?)",
            (record.id, "".join(spec_pieces(record.spec, summary))),
        )


def _labels_of(record: JobRecord) -> list[tuple[str, str, int]]:
    named = [(NAME, record.spec.name)] if record.spec.name else []
    return [(name, value, record.id) for name, value in (*record.spec.labels.items(), *named)]


def mark_output_removed(
    jobs: Collection[JobId], when: datetime, connection: apsw.Connection
) -> None:
    """See `History.mark_output_removed`."""
    connection.executemany(
        "UPDATE jobs SET record = json_set(record, '$.output_removed_at', ?) "
        "WHERE id = ? AND json_extract(record, '$.output_removed_at') IS NULL",
        [(unstructure(when), job) for job in jobs],
    )


def delete(job: JobId, connection: apsw.Connection) -> None:
    """See `History.remove`."""
    record = select_whole(job, connection)
    if record is not None:
        connection.executemany(
            "DELETE FROM labels WHERE name = ? AND value = ? AND job = ?", _labels_of(record)
        )
        connection.execute("DELETE FROM specs WHERE job = ?", (job,))
        connection.execute("DELETE FROM jobs WHERE id = ?", (job,))


def mark_output_missing(job: JobId, connection: apsw.Connection) -> None:
    """See `History.mark_output_missing`."""
    connection.execute(
        "INSERT OR IGNORE INTO removed SELECT id FROM jobs "
        "WHERE id = ? AND json_extract(record, '$.output_removed_at') IS NULL",
        (job,),
    )


def select_with_output(connection: apsw.Connection) -> dict[JobId, str]:
    """See `History.with_output`."""
    marks = ", ".join("?" * len(TERMINAL))
    rows = connection.execute(
        f"SELECT id, owner FROM jobs INDEXED BY jobs_with_output WHERE state IN ({marks}) "  # noqa: S608
        "AND json_extract(record, '$.output_removed_at') IS NULL",
        tuple(state.value for state in TERMINAL),
    )
    return {JobId(int(str(job))): sys.intern(str(owner)) for job, owner in rows}


def select_known(jobs: Collection[JobId], connection: apsw.Connection) -> frozenset[JobId]:
    """Those of the jobs that the history has."""
    query = "SELECT id FROM jobs WHERE id IN (SELECT value FROM json_each(?))"
    rows = connection.execute(query, (dumps(list(jobs)),))
    return frozenset(JobId(int(str(row[0]))) for row in rows)


def select_removed(jobs: Collection[JobId], connection: apsw.Connection) -> frozenset[JobId]:
    """Those of the jobs that were removed while their output was missing."""
    query = "SELECT job FROM removed WHERE job IN (SELECT value FROM json_each(?))"
    rows = connection.execute(query, (dumps(list(jobs)),))
    return frozenset(JobId(int(str(row[0]))) for row in rows)


def select_with_output_of(owner: str, connection: apsw.Connection) -> frozenset[JobId]:
    """See `History.with_output_of`."""
    query = (
        "SELECT id FROM jobs INDEXED BY jobs_with_output WHERE owner = ? "
        "AND json_extract(record, '$.output_removed_at') IS NULL"
    )
    rows = connection.execute(query, (owner,))
    return frozenset(JobId(int(str(row[0]))) for row in rows)


def select_summary(job: JobId, connection: apsw.Connection) -> JobRecord | None:
    """The summary of a job's record; None where there is none."""
    text = connection.execute("SELECT record FROM jobs WHERE id = ?", (job,)).get
    return None if text is None else structure(JobRecord, loads(str(text)))


def select_whole(job: JobId, connection: apsw.Connection) -> JobRecord | None:
    """A job's record with all of its request; None where there is none."""
    query = "SELECT record, spec FROM jobs LEFT JOIN specs ON job = id WHERE id = ?"
    row = connection.execute(query, (job,)).fetchone()
    return None if row is None else _whole(*row)


def select_spec(job: JobId, connection: apsw.Connection) -> str | None:
    """The JSON of what a job's summary leaves out; None where it leaves out nothing."""
    text = connection.execute("SELECT spec FROM specs WHERE job = ?", (job,)).get
    return None if text is None else str(text)


def select_unfinished(connection: apsw.Connection) -> list[JobRecord]:
    """The records of the jobs that have not ended, as they are kept in memory."""
    states = tuple(state.value for state in LIVE)
    marks = ", ".join("?" * len(states))
    count = connection.execute(
        f"SELECT count(*) FROM jobs WHERE state IN ({marks})",  # noqa: S608
        states,
    ).get
    if int(str(count)) >= MANY_UNFINISHED:
        log.info("reading %s jobs of the service before", count)
    query = (
        "SELECT id, record, spec FROM jobs "  # noqa: S608
        "LEFT JOIN specs ON job = id AND octet_length(spec) <= ? "
        f"WHERE state IN ({marks})"
    )
    rows = connection.execute(query, (MAX_READ_BYTES, *states))
    return [_without_bulk(connection, *row) for row in rows]


def _without_bulk(
    connection: apsw.Connection, job: object, text: object, spec: object
) -> JobRecord:
    """A record as it is kept in memory; `spec` is its request if that is small, else None.

    A thousand jobs may wait with a megabyte each, which takes minutes to decode: of a large
    request only the labels are taken, where the summary has not all of them.
    """
    record = _whole(text, spec)
    if "labels" in record.abridged:
        query = "SELECT spec -> '$.labels' FROM specs WHERE job = ?"
        labels = connection.execute(query, (int(str(job)),)).get
        if labels is not None:
            record = with_labels(record, structure(dict[str, str], loads(str(labels))))
    return without_bulk(record)


def _whole(text: object, spec: object) -> JobRecord:
    summary = structure(JobRecord, loads(str(text)))
    return (
        summary
        if spec is None
        else whole(summary, structure(JobSpec, loads(str(spec), bounded=True)))
    )
